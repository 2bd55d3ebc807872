"""What bounds plain decoding on a CPU: the weights that are read, their products, or what is around them.

    python benchmarks/plain.py TARGET [--gguf TARGET.gguf] [--compile] [--busy 2]

With one thread and with all, in alternating rounds, it times

- reading as many bytes as the weights have, out of memory;
- the packed products of one token alone, in the order of the layers, the LM head last;
- a whole token after a context of 128;
- plain decoding of 64 tokens after 100, and with `--compile` the same in compiled steps;
- with a GGUF file, the same in llama.cpp, on f16 weights.

With `--busy` other processes each keep a core busy meanwhile; take `--rounds 2` then, since a token may take a second.
Set `OMP_WAIT_POLICY=PASSIVE` in the environment to let threads sleep while they wait. Prints milliseconds a token, the
median and from the fastest to the slowest round, and how fast plain decoding is over llama.cpp in the same rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from llamacpp import run_llamacpp, write_f16
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpace.decode import Decoder
from dpace.fast.cache import TextCache
from dpace.report.tables import console
from dpace.target import Target

CONTEXT, ROUNDS, CALLS, MEBIBYTE = 128, 9, 10, 2**20
PROMPT = list(range(100, 200))
NUM_NEW = 64
LLAMACPP = "llama.cpp"


def time_calls(run: Callable[[], object]) -> float:
    """Return milliseconds a call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    return 1000 * (time.perf_counter() - start) / CALLS


def make_runs(target: Target) -> tuple[dict[str, Callable[[], object]], int]:
    """Make what is timed, and count the bytes of the weights that a token reads."""
    layers = [layer.fast for layer in target.decoder.layers]
    rows = {size: torch.randn(1, 1, size) for size in (target.hidden_size, target.config.intermediate_size)}
    queries = torch.randn(1, 1, target.decoder.layers[0].self_attn.o_proj.in_features)
    token = torch.zeros(1, 1, dtype=torch.long)
    cache = TextCache(target.config, CONTEXT + 1)
    target.hidden(torch.zeros(1, CONTEXT, dtype=torch.long), cache=cache)
    narrow, wide = rows[target.hidden_size], rows[target.config.intermediate_size]
    num_weights = sum(weight.numel() for weight in target.decoder.layers.parameters() if weight.dim() == 2)
    num_bytes = 2 * (num_weights + target.head.weight.numel())
    read = torch.zeros(num_bytes // 4)

    def products():
        for layer in layers:
            layer.qkv(narrow), layer.out(queries), layer.gate_up(narrow), layer.down(wide)
        target.logits(narrow[0])

    def whole():
        target.logits(target.hidden(token, cache=cache)[0]).argmax()
        cache.crop(-1)

    return {"bytes read": lambda: read.sum(), "products": products, "whole token": whole}, num_bytes


def make_texts(target: Target, f16: Path | None, *, compile: bool) -> dict[str, Callable[[int], float]]:
    """Make the ways of decoding a text, each from a number of threads to milliseconds a token."""

    def with_decoder(decoder: Decoder) -> Callable[[int], float]:
        def decode(_: int) -> float:
            found = decoder.generate(PROMPT, max_new_tokens=NUM_NEW, stop_token_ids=[])
            return 1000 * found.decode_seconds / (NUM_NEW - 1)

        return decode

    def with_llamacpp(num_threads: int) -> float:
        assert f16 is not None
        (answer,) = run_llamacpp(f16, [PROMPT], max_new_tokens=NUM_NEW, num_threads=num_threads)
        return 1000 * answer.decode_seconds / (len(answer.token_ids) - 1)

    texts = {"plain decoding": with_decoder(Decoder(target, None))}
    if compile:
        texts["plain decoding, compiled"] = with_decoder(Decoder(target, None, compile=True))
    if f16 is not None:
        texts[LLAMACPP] = with_llamacpp
    return texts


def measure(target: Target, options: argparse.Namespace, folder: Path) -> None:
    """Time everything in turn and print the table."""
    counts = sorted({1, torch.get_num_threads()})
    runs, num_bytes = make_runs(target)
    if options.gguf:
        write_f16(options.gguf, folder / "f16.gguf")
    texts = make_texts(target, folder / "f16.gguf" if options.gguf else None, compile=options.compile)
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in (*runs, *texts)}
    for number in range(-1, options.rounds):  # the first round compiles, and is not counted
        for count in counts:
            torch.set_num_threads(count)
            times = {name: time_calls(run) for name, run in runs.items()}
            times |= {name: run(count) for name, run in texts.items()}
            if number >= 0:
                for name, milliseconds in times.items():
                    found[name][count].append(milliseconds)
    table = Table("ms", *(f"threads {count}" for count in counts), box=SIMPLE_HEAD)
    for name, by_count in found.items():
        spreads = [by_count[count] for count in counts]
        cells = [f"{statistics.median(spread):.2f} ({min(spread):.2f} to {max(spread):.2f})" for spread in spreads]
        table.add_row(name, *cells)
    console().print(
        f"{num_bytes / MEBIBYTE:.0f} MiB of weights in 16 bits a token; {options.busy} busy processes beside"
    )
    console().print(table)
    for name in texts if options.gguf else ():
        ratios = [
            statistics.median(
                theirs / ours for theirs, ours in zip(found[LLAMACPP][count], found[name][count], strict=True)
            )
            for count in counts
        ]
        console().print(f"{name}: {', '.join(f'{ratio:.2f}' for ratio in ratios)} times as fast as llama.cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--gguf", type=Path, help="a GGUF file of the target, in any precision")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    target = Target.load(options.target, dtype=torch.float32)
    wait = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # ends with this process, however that ends
    others = [subprocess.Popen([sys.executable, "-c", wait]) for _ in range(options.busy)]
    try:
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            measure(target, options, Path(folder))
    finally:
        for other in others:
            other.kill()


if __name__ == "__main__":
    main()
