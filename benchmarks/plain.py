"""What bounds plain decoding on a CPU: the weights that are read, their products, or what is around them.

    python benchmarks/plain.py TARGET [--gguf TARGET.gguf]

With one thread and with all, in alternating rounds, it times

- reading as many bytes as the weights have, out of memory;
- the packed products of one token alone, in the order of the layers, the LM head last;
- a whole token after a context of 128;
- with a GGUF file, llama.cpp's token on f16 weights.

Prints medians in milliseconds a token.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpace.engines.gguf import write_f16
from dpace.engines.llamacpp import run_llamacpp
from dpace.fast.cache import TextCache
from dpace.report.tables import console
from dpace.target import Target

CONTEXT, ROUNDS, CALLS, MEBIBYTE = 128, 9, 10, 2**20


def time_calls(run: Callable[[], object]) -> float:
    """Give milliseconds a call."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    target = Target.load(options.target, dtype=torch.float32)
    counts = sorted({1, torch.get_num_threads()})
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        runs, num_bytes = make_runs(target)
        found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in runs}
        f16 = Path(folder) / "f16.gguf"
        if options.gguf:
            write_f16(options.gguf, f16)
            found["llama.cpp's token"] = {count: [] for count in counts}
        for number in range(ROUNDS):
            for count in counts:
                torch.set_num_threads(count)
                for name, run in runs.items():
                    found[name][count].append(time_calls(run))
                if options.gguf and number % 3 == 0:
                    (answer,) = run_llamacpp(f16, [list(range(100, 200))], max_new_tokens=64, num_threads=count)
                    seconds = answer.decode_seconds / (len(answer.token_ids) - 1)
                    found["llama.cpp's token"][count].append(1000 * seconds)
    table = Table("ms", *(f"threads {count}" for count in counts), box=SIMPLE_HEAD)
    for name, by_count in found.items():
        table.add_row(name, *(f"{statistics.median(by_count[count]):.2f}" for count in counts))
    console().print(f"{num_bytes / MEBIBYTE:.0f} MiB of weights in 16 bits a token")
    console().print(table)


if __name__ == "__main__":
    main()
