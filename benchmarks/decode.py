"""Compare this project's decoding loop with other loops.

    PYTHONPATH=/tmp/dflash python benchmarks/decode.py TARGET DRAFTER [--rounds 3] [--compile]

All loops use the same weights and prompts. Each decodes every prompt in every round, in rotating order. The seconds of
a call for one token are subtracted from those of the full call, so that reading the prompt is not counted. Prints
medians over rounds, and ratios of them. z-lab's loop runs where its package is found; else it is said how to get it.

Width `auto` must not lose to a part of itself; to see only that:

    python benchmarks/decode.py TARGET DRAFTER --rounds 6 --prompts 6 --ways "auto, drafts alone" "random drafter, auto"

The column `auto over it` has its speed over those of plain decoding, of drafts alone, and of copies alone, which is a
random drafter; the bar is 0.97.

With --eight-bits a target in 8 bits decodes in the same rounds. Its texts are compared with its own plain decoding, and
its speeds with that of the other target.

On an accelerator, and with --compile, plain decoding with `torch.compile` is a second baseline: a drafter that beats
only plain decoding in eager mode saves what compiling saves too.
"""

import copy
import statistics
import sys
import time
from collections import Counter
from typing import Any

import torch
import tyro
from loops import Way, demo_questions, transformers_way, zlab_drafter, zlab_way
from transformers import AutoModelForCausalLM

from dpace.decode import Decoder, Paces, generate, generate_plain
from dpace.decode.pace import Pace
from dpace.drafter import Drafter, load_drafter
from dpace.fast.packing import pack_linears
from dpace.report.tables import Section, console, section_table
from dpace.system.progress import progress_bar
from dpace.target import Target

PLAIN = "plain"
SAMPLED = "T=1: plain"
COMPILED = "plain, compiled"
AUTO = "dpace, auto"
DRAFTS = "dpace, auto, drafts alone"
COPIES = "random drafter, auto"
EIGHT_BITS = ", 8 bits"


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

    def plain(**options: Any) -> Way:
        return lambda ids, count: generate_plain(target, ids, max_new_tokens=count, **options).token_ids

    def ours(model: Drafter, **options: Any) -> Way:
        kept = {"paces": Paces(), **options}
        return lambda ids, count: generate(target, model, ids, max_new_tokens=count, **kept).token_ids

    drafts_alone = Paces()
    pace = drafts_alone.get(target, drafter)
    pace.plan = lambda copies=(), *args, **options: Pace.plan(pace, (), *args, **options)
    ways = {PLAIN: plain(), AUTO: ours(drafter, width="auto"), DRAFTS: ours(drafter, width="auto", paces=drafts_alone)}
    for size in sorted({*range(2, min(7, drafter.block_size)), drafter.block_size} - {5}):
        ways[f"dpace, width {size}"] = ours(drafter, width=size)
    ways[COPIES] = ours(random_drafter, width="auto")
    ways["random drafter, full"] = ours(random_drafter, width="full")
    sampled = {"temperature": 1.0, "seed": 0}
    ways[SAMPLED] = plain(**sampled)
    for rule in ("equality", "speculative"):
        ways[f"T=1: dpace, auto, {rule}"] = ours(drafter, width="auto", verify_rule=rule, **sampled)
    return ways


def other_ways(target: Target, drafter: Drafter, folder: str, model: Any = None) -> dict[str, Way]:
    """Make the ways of decoding with the loops of transformers and z-lab.

    Each runs on the model as loaded (`model`, or read again) and, marked `packed`, on ours, which `dpace.fast` changed.
    """
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(target.name, dtype=target.model.dtype)
        model.to(device=target.device)
    unpacked: Any = Drafter.from_pretrained(folder, dtype=target.model.dtype).to(target.device).eval()
    ways: dict[str, Way] = {}
    for mark, owner, assistant in (("", model, unpacked), (", packed", target.model, drafter)):
        ways[f"transformers, plain{mark}"] = transformers_way(owner)
        ways[f"transformers, prompt lookup{mark}"] = transformers_way(
            owner, prompt_lookup_num_tokens=drafter.block_size
        )
        options = {"assistant_model": assistant, "speculation_type": "dflash"}
        ways[f"transformers, DFlash{mark}"] = transformers_way(owner, **options)
    try:
        theirs = zlab_drafter(folder, model)
    except ImportError as error:
        print(error, file=sys.stderr)
        return ways
    packed = copy.deepcopy(theirs)
    pack_linears(packed)
    stops = target.stop_token_ids
    ways["z-lab, DFlash"] = zlab_way(model, theirs, stops)
    ways["z-lab, DFlash, packed"] = zlab_way(target.model, packed, stops)
    return ways


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
                    moments = [time.perf_counter()]
                    for tokens in (1, count):
                        response = ways[name](ids, tokens)
                        moments.append(time.perf_counter())
                    bar.update(task, advance=1, info=name)
                    if number:
                        empty = {"seconds": Counter(), "tokens": Counter(), "texts": {}}
                        result = results[name].setdefault(set_name, empty)
                        before, middle, after = moments
                        result["seconds"][number] += after - middle - (middle - before)
                        result["tokens"][number] += len(response) - 1
                        result["texts"][index] = response
    return results


def rows_of(results: dict, set_name: str) -> list[dict[str, str]]:
    """Write tokens a second, ratios of them, and the number of equal texts, a row for each way."""
    speeds = {}
    for name, found in results.items():
        seconds, tokens = found[set_name]["seconds"], found[set_name]["tokens"]
        speeds[name] = statistics.median(tokens[number] / seconds[number] for number in seconds)
    rows = []
    for name, speed in speeds.items():
        is_sampled = name.startswith("T=1")
        plain = SAMPLED if is_sampled else PLAIN
        own_plain = plain + EIGHT_BITS if name.endswith(EIGHT_BITS) else plain
        texts, expected = (results[way][set_name]["texts"] for way in (name, own_plain))
        rows.append(
            {
                "way": name,
                "tokens/s": f"{speed:.1f}",
                "over plain": f"{speed / speeds[plain]:.2f}",
                "over compiled": "" if is_sampled or COMPILED not in speeds else f"{speed / speeds[COMPILED]:.2f}",
                "auto over it": "" if is_sampled else f"{speeds[AUTO] / speed:.2f}",
                "same text": f"{sum(texts[i] == expected[i] for i in texts)}/{len(texts)}",
            }
        )
    return rows


def main(
    target: tyro.conf.Positional[str],
    drafter: tyro.conf.Positional[str],
    rounds: int = 3,
    prompts: int = 3,
    tokens: int = 96,
    ways: tuple[str, ...] = ("",),
    dtype: str = "float32",
    compile: bool = False,
    eight_bits: bool = False,
) -> None:
    """Run all ways of decoding and print the tables.

    Args:
        target: folder or Hub id.
        drafter: its folder.
        rounds: in which each way decodes every prompt.
        prompts: from each of the demo's sets.
        tokens: of a response.
        ways: run only ways whose names contain one of these, and the ways they are compared with.
        dtype: bfloat16 for GPUs, and for CPUs with bf16 instructions.
        compile: compiled steps too; always on an accelerator.
        eight_bits: our ways with a target in 8 bits too.
    """
    loaded = Target.load(target, dtype=getattr(torch, dtype))
    trained = load_drafter(drafter, loaded)
    found = our_ways(loaded, trained) | other_ways(loaded, trained, drafter)
    if compile or loaded.device.type != "cpu":
        found |= compiled_ways(loaded, trained)
    if eight_bits:
        rounded = Target.load(target, dtype=torch.int8)
        ours = our_ways(rounded, load_drafter(drafter, rounded))
        found |= {name + EIGHT_BITS: way for name, way in ours.items()}
    always = (PLAIN, COMPILED, SAMPLED, AUTO, PLAIN + EIGHT_BITS, SAMPLED + EIGHT_BITS)
    chosen = {name: way for name, way in found.items() if name in always or any(part in name for part in ways)}
    questions = demo_questions(loaded, prompts)
    results = measure(chosen, questions, rounds, tokens)
    for set_name in dict.fromkeys(name for name, _ in questions):
        console().print(section_table(Section(set_name, rows=rows_of(results, set_name))))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
