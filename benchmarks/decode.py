"""Compare this project's decoding loop with other loops, and profile a decoding step.

    pip install --no-deps --target /tmp/dflash dflash==0.1.0 && pip install xllamacpp gguf   # both may be missing
    PYTHONPATH=/tmp/dflash python benchmarks/decode.py TARGET DRAFTER [--gguf TARGET.gguf] [--rounds 3] [--compile]

All loops use the same weights and prompts. Each decodes every prompt in every round, in rotating order. The seconds of
a call for one token are subtracted from those of the full call, so that reading the prompt is not counted. Prints
medians over rounds, and ratios of them. Width `auto` must not lose to a part of itself; to see only that:

    python benchmarks/decode.py TARGET DRAFTER --rounds 6 --prompts 6 --ways "auto, drafts alone" "random drafter, auto"

prints under each table the median over rounds of its speed over the best of plain decoding, drafts alone and copies
alone, which is a random drafter; the bar is 0.97.

On an accelerator, and with --compile, plain decoding with `torch.compile` is a second baseline: a drafter that beats
only plain decoding in eager mode saves what compiling saves too.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llamacpp import answer, make_server, write_f16
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModelForCausalLM

from dpace.config import Width
from dpace.decode import Decoder, Paces, generate, generate_plain
from dpace.decode.loop import Speculation
from dpace.decode.pace import Pace
from dpace.decode.request import make_continuation
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.vocabulary import PackedRows
from dpace.fast.packing import pack_linears
from dpace.prompts.prompts import demo_path, first_of_each_set, read_prompts
from dpace.report.tables import console
from dpace.system.progress import progress_bar
from dpace.target import Target
from dpace.target.chat import encode_chat

Way = Callable[[list[int], int], list[int]]
"""Function from a prompt and a number of tokens to the response."""


COMPILED = "plain, compiled"
AUTO = "dpace, auto"
DRAFTS = "dpace, auto, drafts alone"
COPIES = "random drafter, auto"


def compiled_ways(target: Target, drafter: Drafter) -> dict[str, Way]:
    """Make the ways of decoding with steps that `torch.compile` compiles, without a drafter and with one."""

    def compiled(model: Drafter | None) -> Way:
        decoder = Decoder(target, model, compile=True)
        return lambda ids, count: decoder.generate(ids, max_new_tokens=count).token_ids

    return {COMPILED: compiled(None), f"dpace, compiled blocks of {drafter.block_size}": compiled(drafter)}


def our_ways(target: Target, drafter: Drafter) -> dict[str, Way]:
    """Make the ways of decoding with this project's loop."""
    torch.manual_seed(0)
    random_drafter: Any = Drafter(drafter.config).eval().requires_grad_(False)
    pack_linears(random_drafter)

    def ours(model, **options) -> Way:
        kept = {"paces": Paces(), **options}
        return lambda ids, count: generate(target, model, ids, max_new_tokens=count, **kept).token_ids

    drafts_alone = Paces()
    pace = drafts_alone.get(target, drafter)
    pace.plan = lambda copies=(), *args, **options: Pace.plan(pace, (), *args, **options)
    ways: dict[str, Way] = {
        "plain": lambda ids, count: generate_plain(target, ids, max_new_tokens=count).token_ids,
        AUTO: ours(drafter, width="auto"),
        DRAFTS: ours(drafter, width="auto", paces=drafts_alone),
    }
    for size in [size for size in (2, 3, 4, 6) if size < drafter.block_size] + [drafter.block_size]:
        ways[f"dpace, width {size}"] = ours(drafter, width=size)
    ways[COPIES] = ours(random_drafter, width="auto")
    ways[f"random drafter, blocks of {drafter.block_size}"] = ours(random_drafter, width="full")
    sampled = {"temperature": 1.0, "seed": 0}
    ways["T=1: plain"] = lambda ids, count: generate_plain(target, ids, max_new_tokens=count, **sampled).token_ids
    for rule in ("equality", "speculative"):
        ways[f"T=1: dpace, auto, {rule}"] = ours(drafter, width="auto", verify_rule=rule, **sampled)
    return ways


def cheaper_ways(target: Target, folder: Path, block_size: int) -> dict[str, Way]:
    """Make the ways that show what a draft vocabulary and weights in 16 bits save.

    The weights in fp32 are those of the best checkpoint, where training has left it.
    """
    folders, state = {"any token": folder}, folder / "trainer_state.json"
    if state.exists():
        best = folder / "checkpoints" / f"checkpoint-{json.loads(state.read_text())['best_global_step']}"
        folders |= {"any token, fp32": best} if best.exists() else {}
    ways: dict[str, Way] = {}
    for mark, place in folders.items():
        drafter, paces = load_drafter(place, target, all_tokens=True), Paces()
        for width in ("auto", "full"):

            def run(ids, count, drafter=drafter, width: Width = width, paces=paces):
                return generate(target, drafter, ids, max_new_tokens=count, width=width, paces=paces).token_ids

            ways[f"dpace, {'auto' if width == 'auto' else f'blocks of {block_size}'}, {mark}"] = run
    return ways


def other_ways(target: Target, drafter: Drafter, drafter_folder: str, model: Any = None) -> dict[str, Way]:
    """Make the ways of decoding with the loops of transformers and z-lab.

    Each runs on the model as loaded (`model`, or read again) and, marked `packed`, on ours, which `dpace.fast` changed.
    """
    model = model or AutoModelForCausalLM.from_pretrained(target.name, dtype=target.model.dtype).to(target.device)
    unpacked: Any = Drafter.from_pretrained(drafter_folder, dtype=target.model.dtype).to(target.device).eval()

    def transformers_way(model, **options) -> Way:
        def run(ids, count):
            inputs = torch.tensor([ids], device=target.device)
            mask = torch.ones_like(inputs)
            settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, **options}
            return model.generate(inputs, attention_mask=mask, **settings)[0, len(ids) :].tolist()

        return run

    ways: dict[str, Way] = {}
    for mark, owner, assistant in (("", model, unpacked), (", packed", target.model, drafter)):
        lookup = {"prompt_lookup_num_tokens": drafter.block_size}
        ways[f"transformers, plain{mark}"] = transformers_way(owner)
        ways[f"transformers, prompt lookup{mark}"] = transformers_way(owner, **lookup)
        options = {"assistant_model": assistant, "speculation_type": "dflash"}
        ways[f"transformers, DFlash{mark}"] = transformers_way(owner, **options)
    try:
        import dflash.model as zlab  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("without z-lab's loop: no package `dflash`", file=sys.stderr)
        return ways
    theirs = zlab.DFlashDraftModel.from_pretrained(drafter_folder, dtype=target.model.dtype).to(target.device).eval()

    def zlab_way(owner, drafts) -> Way:
        def run(ids, count):
            inputs = torch.tensor([ids], device=target.device)
            output = zlab.dflash_generate(drafts, owner, inputs, count, target.stop_token_ids, 0.0)
            return output[0, len(ids) :].tolist()

        return run

    packed = copy.deepcopy(theirs)
    pack_linears(packed)
    return {**ways, "z-lab, DFlash": zlab_way(model, theirs), "z-lab, DFlash, packed": zlab_way(target.model, packed)}


def _serve_llamacpp(path: str, num_threads: int, pipe) -> None:
    """Serve llama.cpp's plain decoding in f16 from a process of its own.

    In one process, its threads and torch's slow each other down.
    """
    server = make_server(path, num_threads=num_threads)
    with contextlib.suppress(EOFError):  # the main process has ended
        while True:
            pipe.send(answer(server, *pipe.recv()).token_ids)


def llamacpp_way(path: Path, num_threads: int) -> Way:
    """Make the way of decoding that asks the process of `_serve_llamacpp`."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    arguments = (str(path), num_threads, theirs)
    context.Process(target=_serve_llamacpp, args=arguments, daemon=True).start()

    def run(ids, count):
        pipe.send((ids, count))
        return pipe.recv()

    return run


def measure(ways: dict[str, Way], prompts: list[tuple[str, list[int]]], rounds: int, count: int) -> dict:
    """Measure seconds and texts by way, dataset and round."""
    results: dict = {name: {} for name in ways}
    names = list(ways)
    with progress_bar() as bar:
        task = bar.add_task("decoding", total=(rounds + 1) * len(prompts) * len(ways), info="")
        for number in range(rounds + 1):  # the first is a warm-up
            for index, (set_name, ids) in enumerate(prompts):
                start = (number + index) % len(names)
                for name in names[start:] + names[:start]:
                    seconds = []
                    for tokens in (1, count):
                        begin = time.perf_counter()
                        response = ways[name](ids, tokens)
                        seconds.append(time.perf_counter() - begin)
                    bar.update(task, advance=1, info=name)
                    if number:
                        empty = {"seconds": Counter(), "tokens": Counter(), "texts": {}}
                        result = results[name].setdefault(set_name, empty)
                        result["seconds"][number] += seconds[1] - seconds[0]
                        result["tokens"][number] += len(response) - 1
                        result["texts"][index] = response
    return results


COLUMNS = ("way", "tokens/s", "over\nplain", "over\ncompiled", "auto\nover it", "same\ntext")


def rows_of(results: dict, set_name: str) -> list[tuple[str, ...]]:
    """Write tokens per second, ratios of them, and the number of equal texts, a row for each way."""

    def speed(name: str) -> float:
        result = results[name][set_name]
        return statistics.median(result["tokens"][i] / result["seconds"][i] for i in result["seconds"])

    rows = []
    for name in results:
        is_sampled = name.startswith("T=1")
        plain = "T=1: plain" if is_sampled else "plain"
        texts, expected = (results[way][set_name]["texts"] for way in (name, plain))
        same = sum(texts[i] == expected[i] for i in texts)
        over, compiled, ours = f"{speed(name) / speed(plain):.2f}", "", ""
        if not is_sampled:
            compiled = f"{speed(name) / speed(COMPILED):.2f}" if COMPILED in results else ""
            ours = f"{speed(AUTO) / speed(name):.2f}"
        rows.append((name, f"{speed(name):.1f}", over, compiled, ours, f"{same}/{len(texts)}"))
    return rows


def table_of(results: dict, set_name: str) -> Table:
    """Make the table of `rows_of`."""
    table = Table(*COLUMNS, title=set_name, box=SIMPLE_HEAD, padding=0)  # of at most 80 columns
    for row in rows_of(results, set_name):
        table.add_row(*row)
    return table


def auto_over_parts(results: dict, set_name: str) -> str:
    """Write the speed of width `auto` over that of its best part, round by round."""

    def speeds(name: str) -> list[float]:
        result = results[name][set_name]
        return [result["tokens"][i] / result["seconds"][i] for i in sorted(result["seconds"])]

    parts = [name for name in ("plain", DRAFTS, COPIES) if name in results]
    best = max(parts, key=lambda name: statistics.median(speeds(name)))
    ratios = [ours / theirs for ours, theirs in zip(speeds(AUTO), speeds(best), strict=True)]
    middle = statistics.median(ratios)
    return f"{AUTO}, over the best of {', '.join(parts)}: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}; {best})"


def profile(target: Target, drafter: Drafter, prompts: list[list[int]], count: int) -> Table:
    """Profile decoding: the time in both models' layers, in the LM head, and in everything else."""
    seconds: Counter = Counter()
    calls: Counter = Counter()
    inside: list[str] = []

    def timed(owner: Any, name: str, label: str):
        inner = getattr(owner, name)

        def run(*args, **kwargs):
            if inside:
                return inner(*args, **kwargs)
            inside.append(label)
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            seconds[label] += time.perf_counter() - start
            calls[label] += 1
            inside.clear()
            return result

        setattr(owner, name, run)
        return owner, name, inner

    paces = Paces()
    paces.get(target, drafter)  # measures the steps now, so that this is not timed below
    changed = [
        timed(target, "read", "target's layers"),
        timed(target, "logits", "LM head, verification"),
        timed(PackedRows, "logits", "LM head, drafts"),
        timed(drafter, "forward", "drafter's layers"),
    ]
    total, parts, num_calls = 0.0, Counter(), Counter()
    for ids in prompts:
        text = make_continuation(target, ids, max_new_tokens=count, stop_token_ids=[])
        steps = Speculation(target, drafter, text, paces=paces).steps()
        next(steps)  # reads the prompt
        seconds.clear()
        calls.clear()
        start = time.perf_counter()
        for _ in steps:
            pass
        total += time.perf_counter() - start
        parts.update(seconds)
        num_calls.update(calls)
    for owner, name, inner in changed:
        setattr(owner, name, inner)
    parts["everything else"] = total - sum(parts.values())
    table = Table("part", "share", "calls", "ms per call", title="time of decoding, width auto", box=SIMPLE_HEAD)
    for label, value in parts.items():
        each = f"{1000 * value / num_calls[label]:.1f}" if num_calls[label] else ""
        table.add_row(label, f"{value / total:.1%}", str(num_calls[label] or ""), each)
    return table


def main() -> None:
    """Run all ways of decoding and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--gguf", help="a GGUF file of the target, in any precision, for llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=3, help="number of prompts from each dataset")
    parser.add_argument("--tokens", type=int, default=96)
    ways_help = "run only ways whose names contain one of these, and the ways they are compared with"
    parser.add_argument("--ways", nargs="+", default=[""], help=ways_help)
    parser.add_argument("--dtype", default="float32", help="bfloat16 for GPUs, and for CPUs with bf16 instructions")
    parser.add_argument("--compile", action="store_true", help="compiled steps too; always on an accelerator")
    options = parser.parse_args()
    target = Target.load(options.target, dtype=getattr(torch, options.dtype))
    drafter = load_drafter(options.drafter, target)
    chosen = first_of_each_set(read_prompts(demo_path("heldout")), options.prompts)
    prompts = [(prompt.set, encode_chat(target, prompt.turns[0])) for prompt in chosen]
    console().print(profile(target, drafter, [ids for _, ids in prompts], options.tokens))
    ways = our_ways(target, drafter) | cheaper_ways(target, Path(options.drafter), drafter.block_size)
    ways |= other_ways(target, drafter, options.drafter)
    if options.compile or target.device.type != "cpu":
        ways |= compiled_ways(target, drafter)
    with tempfile.TemporaryDirectory() as folder:
        if options.gguf:
            write_f16(options.gguf, Path(folder) / "f16.gguf")
            for count in sorted({1, torch.get_num_threads()}):
                ways[f"llama.cpp f16, plain, threads {count}"] = llamacpp_way(Path(folder) / "f16.gguf", count)
        chosen_ways = {
            name: way
            for name, way in ways.items()
            if name in ("plain", COMPILED, "T=1: plain", AUTO) or any(part in name for part in options.ways)
        }
        results = measure(chosen_ways, prompts, options.rounds, options.tokens)
    for set_name in dict.fromkeys(name for name, _ in prompts):
        console().print(table_of(results, set_name))
        print(auto_over_parts(results, set_name))


if __name__ == "__main__":
    main()
