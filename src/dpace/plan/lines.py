"""Write a plan in lines of at most 80 columns: what a verb will do, and what it takes.

Recipes, prompts and plans come in; lines go out, which a verb prints before it starts. A disk with too little room is
refused here.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
from pydantic import ByteSize

from dpace.batches.corpus import load_corpus
from dpace.config import CompareConfig, Recipe
from dpace.plan.speed import Number
from dpace.plan.training import (
    TargetPlan,
    TrainingPlan,
    expected_lengths,
    known_lengths,
    num_prompt_tokens,
    plan_recipe,
    plan_target,
)
from dpace.prompts.prompts import Prompt, PromptParts, first_of_each_set, split_prompts
from dpace.respond.conversation import own_messages
from dpace.respond.responses import iterate_responses, read_meta
from dpace.system.progress import count
from dpace.train.checkpoints import checkpoint_folders
from dpace.train.run import choose_conversations, is_finished

START = timedelta(seconds=15)
"""Time that a command takes to import libraries, to find and read its files, and to write what it found."""
TOKEN_BYTES = 8
"""Bytes of a token's number in `responses.jsonl`, and of its text, at most."""
LINE_BYTES = 4096
"""Bytes of a line there without tokens and messages, at most: a template adds some tokens."""
LARGEST_BATCH = 64
"""Largest batch that is tried."""


def size(num_bytes: Number) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    return ByteSize(num_bytes).human_readable(separator=" ")


def time_line(**seconds: Number) -> str:
    """Write about how long work takes altogether, and its parts of a second or more, in hours, minutes and seconds."""
    parts = {"start": START, **{name: timedelta(seconds=round(value)) for name, value in seconds.items()}}
    known = (f"{name} {value}" for name, value in parts.items() if value)
    return f"time: about {sum(parts.values(), timedelta())}: {', '.join(known)}"


def prompts_line(parts: PromptParts) -> str:
    """Write how many prompts each part has."""
    train, validation, heldout = map(len, parts)
    return f"prompts: {train:,} to train, {validation:,} to choose by, {heldout:,} held out"


def disk_line(folder: str | Path, needed: Number) -> str:
    """Write how much of a disk a folder takes and has, and refuse one with too little room.

    Args:
        folder: or file that will be written to; what it has already counts.
        needed: bytes that it will have at most.

    Raises:
        ValueError: there is less room.
    """
    folder = Path(folder)
    there = next(filter(Path.exists, [folder, *folder.absolute().parents]))
    free = shutil.disk_usage(there).free
    written = (folder, *folder.rglob("*"))
    more = needed - sum(path.stat().st_size for path in written if path.is_file())
    if more > free:
        raise ValueError(
            f"{folder} will take {size(more)} more, and its disk has {size(free)} free; make room, or name another "
            "folder with --output"
        )
    return f"disk: up to {size(needed)} in {folder}, {size(free)} free"


def waiting_for_answers(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that have no answer in a recipe's folder."""
    path = recipe.responses_path
    kept = {response.id for response in iterate_responses(path)} if path.exists() else set()
    return [prompt for prompt in prompts if prompt.id not in kept]


def answer_bytes(recipe: Recipe, prompts: Sequence[Prompt]) -> int:
    """Return the bytes that prompts and their answers take in `responses.jsonl` and in a sorted copy of it, at most.

    A prompt's text has no more tokens than bytes.
    """
    limit = recipe.respond.max_new_tokens
    of_prompts = ((1 + TOKEN_BYTES) * len(str(prompt).encode()) + LINE_BYTES for prompt in prompts)
    of_answers = (2 * TOKEN_BYTES * limit * len(prompt.turns) for prompt in prompts)
    return 2 * (sum(of_prompts) + sum(of_answers))


def answer_lines(recipe: Recipe, parts: PromptParts) -> list[str]:
    """Write what `dpace respond` will do.

    Raises:
        ValueError: the disk has no room for the answers, or a prompt has no reply to train on.
    """
    prompts = sum(parts, [])
    waiting = waiting_for_answers(recipe, prompts)
    lines = [prompts_line(parts), f"answers: {len(prompts) - len(waiting):,} kept, {len(waiting):,} to come"]
    if recipe.respond.source == "own":
        for prompt in waiting:
            own_messages(prompt)
    elif not recipe.respond.server:
        lines.append(time_line(answers=answering_seconds(recipe, plan_target(recipe), waiting)))
    return [*lines, disk_line(recipe.responses_path, answer_bytes(recipe, prompts))]


def answering_seconds(recipe: Recipe, target: TargetPlan, prompts: Sequence[Prompt]) -> Number:
    """Estimate the seconds in which the target answers prompts, at most."""
    return target.answering_seconds(
        sum(len(prompt.turns) for prompt in prompts),
        recipe.respond.max_new_tokens,
        num_read=sum(map(num_prompt_tokens, prompts)),
        at_once=recipe.respond.batch_size,
    )


def num_decodings(recipe: Recipe, prompts: Sequence[Prompt], num_drafters: int) -> int:
    """Count the answers that `dpace.measure.benchmark.bench` decodes."""
    bench = recipe.bench
    turns = sum(len(prompt.turns) for prompt in first_of_each_set(prompts, bench.num_prompts))
    return turns * len(bench.temperatures) * (1 + num_drafters * len(bench.widths) * len(bench.verify_rules))


def decoding_lines(recipe: Recipe, num_answers: int, num_tokens: int) -> list[str]:
    """Write how many answers of up to `num_tokens` a verb decodes, one at a time, and about how long that takes."""
    target = plan_target(recipe)
    return [
        f"answers: {num_answers:,} of up to {num_tokens} tokens",
        time_line(decoding=target.answering_seconds(num_answers, num_tokens)),
    ]


def train_lines(plan: TrainingPlan, folder: Path) -> list[str]:
    """Write what the whole training of a drafter takes, and at which step it goes on.

    Raises:
        ValueError: the disk has no room for it.
    """
    lines = [*training_lines(plan), time_line(training=plan.seconds), disk_line(folder, plan.disk_bytes)]
    done = max(checkpoint_folders(folder / "checkpoints"), default=0)
    return [*lines, f"goes on at step {done + 1:,}"] if done else lines


def comparison_lines(config: CompareConfig, parts: PromptParts, folders: Sequence[Path]) -> list[str]:
    """Write what `dpace compare` or `dpace demo` takes: to answer, to train drafters, and to decode with them.

    `folders` are those of the drafters, finished ones too.

    Raises:
        ValueError: the disk has no room for it, or the drafter cannot work with this target.
    """
    prompts = sum(parts, [])
    waiting = [] if config.respond.server else waiting_for_answers(config, prompts)
    plan = plan_recipe(config, expected_lengths(parts.train, config))
    num_waiting = sum(not is_finished(folder) for folder in folders)
    num_answers = num_decodings(config, parts.heldout, len(folders) // len(config.seeds))
    time = time_line(
        answers=answering_seconds(config, plan, waiting),
        training=num_waiting * plan.seconds,
        decoding=plan.answering_seconds(num_answers, config.bench.max_new_tokens),
    )
    disk = disk_line(config.output, answer_bytes(config, prompts) + len(folders) * plan.disk_bytes)
    drafters = f"drafters: {len(folders) - num_waiting} kept, {num_waiting} to come"
    return [prompts_line(parts), drafters, *training_lines(plan), time, disk]


def training_lines(plan: TrainingPlan) -> list[str]:
    """Write what the training of a drafter is, and how much of the memory it takes."""
    return [
        f"training: {count(plan.num_steps, 'step')}, "
        f"{count(plan.lengths.shape[1], 'conversation')} of {int(plan.lengths[0].mean()):,} tokens",
        f"drafter: {plan.drafter.num_parameters() / 1e6:.4g} M parameters; hidden states {plan.feature_place} "
        f"({size(plan.feature_bytes)})",
        f"memory: {size(sum(plan.memory(plan.batch()).values()))} of {size(plan.machine.memory)}",
    ]


def plan_lines(recipe: Recipe, memory: int | None = None) -> list[str]:
    """Write what `dpace plan` says of a recipe: memory by part, disk, tokens, steps and time.

    Prompts that are not on this machine are not read: a batch of the longest conversations stands for them.

    Raises:
        ValueError: see `load_corpus`, `split_prompts` and `plan_recipe`.
    """
    answers = recipe.responses_path
    note = ""
    if read_meta(answers).get("complete"):
        lengths = known_lengths(choose_conversations(*load_corpus(answers, recipe.prompts), recipe)[0])
    elif recipe.prompts.path == "demo" or Path(recipe.prompts.path).exists():
        lengths = expected_lengths(split_prompts(recipe.prompts).train, recipe)
        note = "not all answers are there: each counts as long as the recipe allows"
    else:
        lengths = np.full((2, recipe.train.batch_size), float(recipe.train.max_length))
        note = "prompts are not on this machine: steps and time are of one batch of the longest conversations"
    plan = plan_recipe(recipe, lengths, memory=memory)
    batch = plan.batch()
    checkpointing = replace(plan, recipe=replace(recipe, train=replace(recipe.train, gradient_checkpointing=True)))
    batches = [batch._replace(size=number + 1) for number in range(LARGEST_BATCH)]
    largest, checkpointed = (sum(map(each.fits, batches)) for each in (plan, checkpointing))
    change = "" if checkpointed else "makes it fit: a lower --train.num-anchors or --train.max-length"
    return [
        *training_lines(plan),
        time_line(training=plan.seconds),
        "memory of a training step, computed:",
        *(f"  {part:<28} {size(number):>10}" for part, number in plan.memory(batch).items() if number),
        f"{'fits' if plan.fits(batch) else 'does not fit'} in {size(plan.machine.memory)}; largest --train.batch-size "
        f"that fits: {largest}, and {checkpointed} with --train.gradient-checkpointing",
        f"disk: up to {size(plan.disk_bytes)} in {recipe.output}/drafter",
        *filter(None, (change, note)),
    ]
