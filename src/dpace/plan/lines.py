"""Write a plan in lines of at most 80 columns: what a verb will do, and what it takes.

Recipes, prompts and plans come in; lines go out, which a verb prints before it starts. A disk with too little room is
refused here.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import ByteSize

from dpace.config import BenchConfig, CompareConfig, Recipe
from dpace.plan.speed import Number
from dpace.plan.training import (
    TargetPlan,
    TrainingPlan,
    expected_lengths,
    mean_answer,
    plan_recipe,
    plan_target,
    steps_done,
)
from dpace.prompts.prompts import Prompt, PromptParts, first_of_each_set
from dpace.respond.conversation import own_messages
from dpace.respond.responses import AnswerLengths, answer_lengths
from dpace.system.ledger import read_jsonl
from dpace.system.progress import count
from dpace.system.provenance import hash_json

TOKEN_BYTES = 8
"""Bytes of a token's number in `responses.jsonl`, and of its text, at most."""
LINE_BYTES = 4096
"""Bytes of a line there, or of a benchmark's, without tokens and messages, at most: a template adds some tokens."""
DECODED_BYTES = 256
"""Bytes of a decoded token in all files of a benchmark and of what compares it, at most."""
PAGES = 2**23
"""Bytes of plots, reports and tables, at most."""
LARGEST_BATCH = 64
"""Largest batch that is tried."""
SMALLER = "a lower --train.num-anchors or --train.max-length, or a smaller target"


def size(num_bytes: Number) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    return ByteSize(num_bytes).human_readable(separator=" ")


def duration(seconds: Number) -> str:
    """Write a time in its largest unit that fits, such as 12 min."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{max(1, seconds):.0f} s"


def time_line(seconds: Mapping[str, Number]) -> str:
    """Write about how long work takes altogether, and its parts of a second or more."""
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if value >= 1)
    return f"time: about {duration(sum(seconds.values()))}: {parts}"


def prompts_line(parts: PromptParts) -> str:
    """Write how many prompts each part has."""
    return (
        f"prompts: {len(parts.train):,} to train, {len(parts.validation):,} to choose by, "
        f"{len(parts.heldout):,} held out"
    )


def free_disk(folder: str | Path) -> int:
    """Return the free bytes of the disk that a folder is on or will be on."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_line(folder: str | Path, needed: int) -> str:
    """Write how much of a disk a folder takes and has, and refuse one with too little room.

    Args:
        folder: or file that will be written to; what it has already counts.
        needed: bytes that it will have at most.

    Raises:
        ValueError: there is less room.
    """
    free = free_disk(folder)
    paths = (Path(folder), *Path(folder).rglob("*"))
    more = needed - sum(path.stat().st_size for path in paths if path.is_file())
    if more > free:
        raise ValueError(
            f"{folder} will take {size(more)} more, and its disk has {size(free)} free; make room, or name another "
            "folder with --output"
        )
    return f"disk: up to {size(needed)} in {folder}, {size(free)} free"


def kept_answers(recipe: Recipe) -> dict[str, AnswerLengths]:
    """Read the lengths of the answers that a recipe's folder has, by the prompt's id."""
    return answer_lengths(Path(recipe.output) / "responses.jsonl")


def answer_bytes(recipe: Recipe, prompts: Sequence[Prompt]) -> int:
    """Return the bytes that prompts and their answers take in `responses.jsonl` and in a sorted copy of it, at most.

    A prompt's text has no more tokens than bytes.
    """
    asked = sum(len(str(prompt).encode()) for prompt in prompts) * (1 + TOKEN_BYTES)
    answered = sum(len(prompt.turns) for prompt in prompts) * recipe.respond.max_new_tokens * 2 * TOKEN_BYTES
    return 2 * (asked + answered + LINE_BYTES * (1 + len(prompts)))


def answer_lines(recipe: Recipe, parts: PromptParts) -> list[str]:
    """Write what `dpace respond` will do.

    Raises:
        ValueError: the disk has no room for the answers, or a prompt has no reply to train on.
    """
    respond, kept = recipe.respond, kept_answers(recipe)
    path = Path(recipe.output) / "responses.jsonl"
    waiting = [prompt for part in parts for prompt in part if prompt.id not in kept]
    turns = sum(len(prompt.turns) for prompt in waiting)
    lines = [prompts_line(parts)]
    if respond.source == "own":
        for prompt in waiting:
            own_messages(prompt)
        lines.append(f"answers: {len(kept):,} kept, {len(waiting):,} taken from the prompts")
    else:
        where = f" at each of {count(len(respond.server), 'server')}" if respond.server else ""
        lines.append(
            f"answers: {len(kept):,} kept, {count(turns, 'answer')} to write, up to {respond.max_new_tokens} tokens "
            f"each; {respond.batch_size} at once{where}"
        )
    if respond.source == "target" and not respond.server:
        target = plan_target(recipe)
        seconds = {"start": target.start_seconds, "answers": answering_seconds(recipe, target, waiting, kept)}
        lines.append(time_line(seconds))
    written = path.stat().st_size if kept else 0
    return [*lines, disk_line(path, 2 * written + answer_bytes(recipe, waiting))]


def answering_seconds(
    recipe: Recipe, target: TargetPlan, prompts: Sequence[Prompt], kept: Mapping[str, AnswerLengths]
) -> Number:
    """Estimate the seconds in which the target reads prompts and writes answers, in batches, like those it wrote."""
    turns = sum(len(prompt.turns) for prompt in prompts)
    tokens, answered = expected_lengths(prompts, recipe, kept)
    read = target.reading_seconds((tokens - answered).sum())
    return read + target.decoding_seconds(turns, mean_answer(kept, recipe), recipe.respond.batch_size)


def num_decodings(recipe: Recipe, prompts: Sequence[Prompt], num_drafters: int) -> int:
    """Count the answers that `dpace.measure.benchmark.bench` decodes."""
    bench = recipe.bench
    turns = sum(len(prompt.turns) for prompt in first_of_each_set(prompts, bench.num_prompts))
    return turns * len(bench.temperatures) * (1 + num_drafters * len(bench.widths) * len(bench.verify_rules))


def num_decoded(folder: Path, bench: BenchConfig, prompts: Sequence[Prompt]) -> int:
    """Count the answers that a benchmark of these settings and prompts has kept in a folder.

    Those of drafters that were trained again since count too: their weights are not read here.
    """
    known = {
        "max_new_tokens": bench.max_new_tokens,
        "seed": bench.seed,
        "prompts_sha256": hash_json([asdict(prompt) for prompt in prompts]),
    }
    chosen = {prompt.id for prompt in first_of_each_set(prompts, bench.num_prompts)}
    most = 0
    for path in folder.glob("bench-*.jsonl"):
        setup, *rows = (row for _, row in read_jsonl(path, is_growing=True))
        if all(setup.get(name) == value for name, value in known.items()):
            ways = {*bench.widths, None}
            done = [r for r in rows if r["id"] in chosen and r["temperature"] in bench.temperatures]
            most = max(most, sum(r["width"] in ways for r in done))
    return most


def decoding_lines(recipe: Recipe, num_answers: int, num_tokens: int, *, done: int = 0) -> list[str]:
    """Write how many answers of up to `num_tokens` a verb decodes, one at a time, and about how long that takes."""
    target = plan_target(recipe)
    left = max(0, num_answers - done)
    seconds = {"start": target.start_seconds, "decoding": target.decoding_seconds(left, num_tokens)}
    return [
        f"answers: {num_answers:,} of up to {num_tokens} tokens, {left:,} left to decode",
        time_line(seconds),
    ]


def train_lines(plan: TrainingPlan, folder: Path) -> list[str]:
    """Write what the training of a drafter takes.

    Raises:
        ValueError: the disk has no room for it.
    """
    return [
        *training_lines(plan, [folder]),
        time_line({"start": plan.start_seconds, **plan.seconds([folder])}),
        disk_line(folder, plan.disk_bytes),
    ]


def comparison_lines(config: CompareConfig, parts: PromptParts, folders: Sequence[Path]) -> list[str]:
    """Write what `dpace compare` or `dpace demo` takes; what is finished takes no time.

    Raises:
        ValueError: the disk has no room for it, or the drafter cannot work with this target.
    """
    kept = kept_answers(config)
    prompts = [prompt for part in parts for prompt in part]
    waiting = [prompt for prompt in prompts if prompt.id not in kept and not config.respond.server]
    plan = plan_recipe(config, *(expected_lengths(part, config, kept) for part in parts[:2]))
    unmeasured = sum(not (folder / "heldout.json").exists() for folder in folders)
    decodings = num_decodings(config, parts.heldout, len(folders) // len(config.seeds))
    left = max(0, decodings - num_decoded(Path(config.output) / "decode", config.bench, parts.heldout))
    limit = config.bench.max_new_tokens
    seconds = {
        "start": plan.start_seconds,
        "answers": answering_seconds(config, plan, waiting, kept),
        "training": sum(plan.seconds(folders).values()),
        "measuring": plan.measuring_seconds(unmeasured * expected_lengths(parts.heldout, config, kept)[1].sum()),
        "decoding": plan.decoding_seconds(left, min(limit, mean_answer(kept, config))),
    }
    disk = answer_bytes(config, prompts) + len(folders) * (plan.disk_bytes + LINE_BYTES * len(parts.heldout))
    disk += decodings * (LINE_BYTES + DECODED_BYTES * limit) + PAGES
    return [
        prompts_line(parts),
        *training_lines(plan, folders),
        time_line(seconds),
        disk_line(config.output, disk),
    ]


def training_lines(plan: TrainingPlan, folders: Sequence[Path]) -> list[str]:
    """Write what the training of drafters is, at which step one goes on, and whether it fits into memory."""
    machine, parameters = plan.machine, plan.drafter.num_parameters()
    going_on = [done + 1 for folder in folders if 0 < (done := steps_done(folder)) < plan.num_steps]
    fits = "" if plan.fits(plan.shape()) else "; `dpace plan` says what to lower"
    return [
        f"training: {len(folders)} x {count(plan.num_steps, 'step')}, "
        f"{count(plan.trained.shape[1], 'conversation')} of {int(plan.trained[0].mean()):,} tokens",
        *(f"goes on at step {step:,}" for step in going_on),
        f"drafter: {parameters / 1e6:.4g} M parameters; hidden states {plan.feature_place} "
        f"({size(plan.feature_bytes)})",
        f"memory: {size(sum(plan.memory(plan.shape()).values()))} of {size(machine.memory)}{fits} "
        f"({machine.training_speed.flops / 1e12:.3g} TFLOP/s)",
    ]


def memory_lines(plan: TrainingPlan) -> list[str]:
    """Write the memory of a step by part, its operations, and the largest batch that fits."""
    shape, flops = plan.shape(), plan.flops(plan.shape())
    shares = ", ".join(f"{name} {number / sum(flops.values()):.0%}" for name, number in flops.items() if number)
    batches = [shape._replace(batch_size=number) for number in range(1, LARGEST_BATCH + 1)]
    most, again = (sum(plan.fits(batch, is_checkpointed=again) for batch in batches) for again in (False, True))
    return [
        "memory of a training step, computed:",
        *(f"  {part:<28} {size(number):>10}" for part, number in plan.memory(shape).items() if number),
        f"operations of a step: {sum(flops.values()) / 1e12:.3g} TFLOP ({shares})",
        f"{'fits' if plan.fits(shape) else 'does not fit'} in {size(plan.machine.memory)}; largest --train.batch-size "
        f"that fits: {most}, and {again} with --train.gradient-checkpointing",
        *([] if again else [f"makes it fit: {SMALLER}"]),
    ]
