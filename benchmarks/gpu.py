"""Measure one GPU: the tests that need it, a training step by part, memory against the plan, and decoding.

    python benchmarks/gpu.py [--target NAME] [--random] [--drafter FOLDER] [--peak-tflops N]

Trains 50 steps of the recipe `qwen3-4b-3l` on random tokens, whose steps take as long as those on text. Then it decodes
the demo's prompts with this drafter, or with that of --drafter, whose text is accepted more often. --random makes a
target of the same shape where nothing can be downloaded; then only seconds mean something, not accepted lengths. Writes
`gpu.json` and, for pages, `gpu.md`. z-lab's loop runs where its package is found.
"""

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
import tyro
from decode import AUTO, PLAIN, compiled_ways, measure, other_ways, our_ways, rows_of
from gpu_step import PROMPT_TOKENS, peak_flops, time_training
from loops import Way, demo_questions
from transformers import AutoModelForCausalLM, Qwen3Config

from dpace.config import Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.fast.speed_up import speed_up
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.report.tables import Section, to_markdown
from dpace.system.device import default_dtype, find_device
from dpace.system.ledger import write_text
from dpace.system.provenance import find_hardware, find_versions
from dpace.target import Target
from dpace.target.locate import find_drafter, find_target

SHAPES = {
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32),
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16),
}
"""Hidden and feed-forward size, layers and heads of published targets, for --random; the rest is the same."""
ROUNDS = 3
NUM_PROMPTS = 2


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
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def working_ways(ways: dict[str, Way], ids: Sequence[int]) -> tuple[dict[str, Way], dict[str, str]]:
    """Try each way of decoding; give those that work, and the reasons why others do not."""
    skipped = {}
    for name, way in ways.items():
        try:
            way(list(ids), 2)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            skipped[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return {name: way for name, way in ways.items() if name not in skipped}, skipped


def time_decoding(target: Target, drafter: Drafter, folder: str, model: Any, tokens: int) -> dict[str, Any]:
    """Decode with this project's loop, plainly, compiled on a GPU, and with the loops of others.

    `model` is the target's as it was loaded; None to read it again.
    """
    if target.tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(len(target.head.weight) - 1, (NUM_PROMPTS, PROMPT_TOKENS), generator=generator)
        questions = [("random tokens", row) for row in rows.tolist()]
    else:
        questions = [("demo", ids) for _, ids in demo_questions(target, NUM_PROMPTS)]
    set_name, ids = questions[0]
    names = (PLAIN, AUTO, f"dpace, width {drafter.block_size}")
    ways = {name: way for name, way in our_ways(target, drafter).items() if name in names}
    ways |= compiled_ways(target, drafter) if target.device.type != "cpu" else {}
    ways |= {name: way for name, way in other_ways(target, drafter, folder, model).items() if "lookup" not in name}
    working, skipped = working_ways(ways, ids)
    rows = rows_of(measure(working, questions, ROUNDS, tokens), set_name)
    return {"prompts": f"{len(questions)}, {set_name}", "rows": rows, "skipped": skipped}


def markdown(report: dict[str, Any]) -> str:
    """Write the tables of a report for a page."""
    training, decoding = report["training"], report["decoding"]
    step, peak = training["step_seconds"], training["peak_memory_bytes"]
    parts = [
        {"part of a step": part, "ms": f"{1000 * seconds:.1f}", "share": f"{seconds / step:.0%}"}
        for part, seconds in [*training["part_seconds"].items(), ("whole step", step)]
    ]
    unknown = "peak of this device not known: name it by --peak-tflops"
    facts = {
        "tokens/s": f"{training['tokens_per_second']:.0f}",
        "MFU": unknown if training["mfu"] is None else f"{training['mfu']:.1%}",
        "peak memory": f"{peak / 2**30:.2f} GiB",
        "planned": f"{training['planned_memory_bytes'] / 2**30:.2f} GiB",
    }
    skipped = [f"left out: {name} ({why})" for name, why in decoding["skipped"].items()]
    title = f"{report['target']} on one {report['hardware']['device']}"
    sections = [
        Section(title, f"Tests: {report['tests']['summary']}.", parts),
        Section("Training", rows=[{"training": name, "": fact} for name, fact in facts.items()]),
        Section(f"Decoding: {decoding['prompts']}", rows=decoding["rows"], note="; ".join(skipped)),
    ]
    return "\n\n".join(map(to_markdown, sections)) + "\n"


def measure_all(
    target: Target,
    recipe: Recipe,
    steps: int,
    drafter: str | None = None,
    peak_tflops: float | None = None,
    make_model: Callable[[], Any] = lambda: None,
    tokens: int = 128,
) -> dict[str, Any]:
    """Train and decode; what `markdown` writes, without the tests.

    `make_model` makes the target's model again, where it cannot be loaded by its name.
    """
    hardware = find_hardware(target.device)
    trained, training = time_training(target, recipe, steps, peak_flops(hardware.device, peak_tflops))
    with tempfile.TemporaryDirectory() as folder:
        place = find_drafter(drafter, "--drafter") if drafter else folder
        if not drafter:
            trained.save_pretrained(folder)
        decoding = time_decoding(target, load_drafter(place, target), str(place), make_model(), tokens)
    facts = {"hardware": asdict(hardware), "versions": asdict(find_versions())}
    return {**facts, "training": training, "decoding": decoding}


def main(
    target: str | None = None,
    random: bool = False,
    drafter: str | None = None,
    peak_tflops: float | None = None,
    steps: int = 50,
    out: Path = Path(),
) -> None:
    """Run everything and write `gpu.json` and `gpu.md`.

    Args:
        target: another target in place of the recipe's, such as Qwen/Qwen3-0.6B.
        random: random weights in the target's shape; no download.
        drafter: folder or Hub id of a trained drafter to decode with.
        peak_tflops: dense bf16 peak of this device.
        steps: of training.
        out: folder for gpu.json and gpu.md.
    """
    recipe = read_recipe(RECIPES["qwen3-4b-3l"])
    recipe = replace(recipe, target=target or recipe.target)
    device = find_device()
    if device.type == "cpu":
        sys.exit("torch finds no accelerator here; this benchmark is for one GPU")
    out.mkdir(parents=True, exist_ok=True)
    tests = run_tests()
    if random:
        make_model = partial(random_model, recipe.target, default_dtype(device), device)
        loaded = Target(make_model())
        speed_up(loaded.model)  # as `Target.load` does
        found = measure_all(loaded, recipe, steps, drafter, peak_tflops, make_model)
    else:
        found = measure_all(Target.load(find_target(recipe.target)), recipe, steps, drafter, peak_tflops)
    report = {"target": recipe.target, "is_random": random, "tests": tests, **found}
    write_text(out / "gpu.json", json.dumps(report, indent=2) + "\n")
    write_text(out / "gpu.md", markdown(report))
    print(markdown(report))
    sys.exit(not tests["passed"])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
