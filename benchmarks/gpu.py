"""Measure one GPU: the tests that need it, a training step by part, memory against the plan, and decoding.

    python benchmarks/gpu.py [--small | --target NAME] [--random] [--drafter FOLDER] [--peak-tflops N]

Trains 50 steps of the recipe `qwen3-4b-3l` on random tokens, whose steps take as long as those on text. Then it decodes
the demo's prompts with this drafter, or with that of --drafter, whose text is accepted more often. --random makes a
target of the same shape where nothing can be downloaded; then only seconds mean something, not accepted lengths. Writes
`gpu.json` and, for pages, `gpu.md`. z-lab's loop runs where its package is found, see `benchmarks/zlab.py`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode import COLUMNS, compiled_ways, measure, other_ways, our_ways, rows_of
from gpu_step import PROMPT_TOKENS, peak_flops, time_training
from transformers import AutoModelForCausalLM, Qwen3Config

from dpace.config import Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.fast.speed_up import speed_up
from dpace.prompts.prompts import demo_path, first_of_each_set, read_prompts
from dpace.recipes.flags import parse
from dpace.system.device import default_dtype, find_device
from dpace.system.ledger import write_text
from dpace.system.provenance import find_hardware, find_versions
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import find_drafter, find_target

RECIPE, SMALL = "qwen3-4b-3l", "Qwen/Qwen3-0.6B"
_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
SHAPES = {
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32),
    SMALL: (1024, 3072, 28, 16),
}
"""Hidden and feed-forward size, layers and heads of published targets, for --random; the rest is the same."""
ROUNDS, PROMPTS_OF_SET, TOKENS = 3, 2, 128


def run_tests() -> dict[str, Any]:
    """Run the tests that need a GPU, in a process of their own."""
    arguments = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(arguments, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return {"passed": done.returncode == 0, "summary": last.strip("= ")}


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Make a model with the shape of a published one and random weights, the same at each call."""
    if name not in SHAPES:
        raise SystemExit(f"--random knows the shapes of {', '.join(SHAPES)}, not of {name}")
    hidden, feed_forward, layers, heads = SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_attention_heads": heads}
    config = Qwen3Config(**_QWEN3, **sizes, num_hidden_layers=layers, tie_word_embeddings=True)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def working_ways(ways: dict[str, Callable], ids: Sequence[int]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Try each way of decoding; give those that work, and the reasons why others do not."""
    skipped = {}
    for name, way in ways.items():
        try:
            way(list(ids), 2)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            skipped[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return {name: way for name, way in ways.items() if name not in skipped}, skipped


def time_decoding(
    target: Target, drafter: Drafter, folder: str, model: Any, *, is_compiled: bool, tokens: int
) -> dict[str, Any]:
    """Decode with this project's loop, plainly, compiled, and with the loops of others on a model as it was loaded."""
    if target.tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(len(target.head.weight) - 1, (PROMPTS_OF_SET, PROMPT_TOKENS), generator=generator)
        prompts = [("random tokens", row) for row in rows.tolist()]
    else:
        chosen = first_of_each_set(read_prompts(demo_path("heldout")), PROMPTS_OF_SET)
        prompts = [("demo", encode_chat(target, prompt.turns[0])) for prompt in chosen]
    whole = f"dpace, blocks of {drafter.block_size}"
    ways = {name: way for name, way in our_ways(target, drafter).items() if name in ("plain", "dpace, auto", whole)}
    skipped = {} if is_compiled else {"compiled": "on a CPU it is left out"}
    ways |= compiled_ways(target, drafter) if is_compiled else {}
    ways |= {name: way for name, way in other_ways(target, drafter, folder, model).items() if "lookup" not in name}
    working, found = working_ways(ways, prompts[0][1])
    if not any(name.startswith("z-lab") for name in ways):
        skipped["z-lab, DFlash"] = "no package `dflash`"
    set_name = prompts[0][0]
    rows = rows_of(measure(working, prompts, ROUNDS, tokens), set_name)
    return {
        "prompts": f"{len(prompts)}, {set_name}",
        "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
        "skipped": skipped | found,
    }


def markdown(report: dict[str, Any]) -> str:
    """Write the tables of a report for a page."""
    gib, training, hardware = 2**30, report["training"], report["hardware"]["device"]
    lines = [f"## {report['target']} on one {hardware}", "", f"Tests: {report['tests']['summary']}.", ""]
    step = training["step_seconds"]
    lines += ["| part of a training step | ms | share |", "|---|---|---|"]
    lines += [f"| {part} | {1000 * s:.1f} | {s / step:.0%} |" for part, s in training["part_seconds"].items()]
    lines += [f"| **whole step** | {1000 * step:.1f} | |", "", "| training | |", "|---|---|"]
    lines += [f"| tokens/s | {training['tokens_per_second']:.0f} |"]
    mfu = "peak of this device not known: name it by --peak-tflops" if training["mfu"] is None else ""
    lines += [f"| MFU | {mfu or format(training['mfu'], '.1%')} |"]
    found = training["peak_memory_bytes"]
    lines += [f"| peak memory | {'not told' if found is None else f'{found / gib:.2f} GiB'} |"]
    lines += [f"| planned | {training['planned_memory_bytes'] / gib:.2f} GiB |"]
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row.values())} |" for row in report["decoding"]["rows"]]
    lines += ["", *(f"Left out: {name} ({why})." for name, why in report["decoding"]["skipped"].items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run everything and write `gpu.json` and `gpu.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help=f"{SMALL} in place of the recipe's target")
    parser.add_argument("--target", help="another target in place of the recipe's")
    parser.add_argument("--random", action="store_true", help="random weights in the target's shape; no download")
    parser.add_argument("--drafter", help="folder or Hub id of a trained drafter to decode with")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of this device")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default=".", help="folder for gpu.json and gpu.md")
    options = parser.parse_args()
    recipe: Recipe = parse(Recipe, "train", [RECIPE])
    recipe = replace(recipe, target=options.target or (SMALL if options.small else recipe.target))
    device = find_device()
    if device.type == "cpu":
        raise SystemExit("torch finds no accelerator here; this benchmark is for one GPU")
    tests = run_tests()
    make_model = partial(random_model, recipe.target, default_dtype(device), device) if options.random else None
    if make_model is None:
        target = Target.load(find_target(recipe.target))
    else:
        target = Target(make_model())
        target.speed_ups = speed_up(target.model)  # as `Target.load` does
    report = measure_all(target, recipe, options, make_model, is_compiled=True)
    report = {"target": recipe.target, "is_random": options.random, "tests": tests, **report}
    for name, text in (("gpu.json", json.dumps(report, indent=2) + "\n"), ("gpu.md", markdown(report))):
        write_text(Path(options.out) / name, text)
    print(markdown(report))
    sys.exit(not tests["passed"])


def measure_all(
    target: Target, recipe: Recipe, options: Any, make_model: Callable | None = None, *, is_compiled: bool
) -> dict[str, Any]:
    """Train and decode; what `markdown` writes, without the tests.

    `make_model` makes the target's model again, where it cannot be loaded by its name.
    """
    hardware = find_hardware(target.device)
    drafter, training = time_training(target, recipe, options.steps, peak_flops(hardware.device, options.peak_tflops))
    with tempfile.TemporaryDirectory() as folder:
        place = find_drafter(options.drafter, "--drafter") if options.drafter else folder
        if not options.drafter:
            drafter.save_pretrained(folder)
        ours, model = load_drafter(place, target), make_model() if make_model else None
        decoding = time_decoding(target, ours, str(place), model, is_compiled=is_compiled, tokens=TOKENS)
    facts = {"hardware": asdict(hardware), "versions": asdict(find_versions())}
    facts |= {"recipe": RECIPE, "speed_ups": target.speed_ups}
    return {**facts, "training": training, "decoding": decoding}


if __name__ == "__main__":
    main()
