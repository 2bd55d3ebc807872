"""Write in lines of at most 80 columns what a verb will do, and what a recipe takes.

Recipes, prompts and plans come in; lines go out, which a verb prints before it starts.
"""

import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from pydantic import ByteSize

from dpace.batches.corpus import load_corpus
from dpace.config import CompareConfig, Recipe
from dpace.plan.training import Number, TrainingPlan, expected_lengths, known_lengths, plan_recipe
from dpace.prompts.prompts import Prompt, PromptParts, split_prompts
from dpace.respond.responses import iterate_responses, read_meta
from dpace.system.progress import count
from dpace.train.identity import is_finished
from dpace.train.run import choose_conversations


def size(num_bytes: Number) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    return ByteSize(num_bytes).human_readable(separator=" ")


def time_line(work: str, seconds: Number) -> str:
    """Write about how long some work takes, in days, hours, minutes and seconds."""
    return f"{work}: about {timedelta(seconds=round(seconds))}"


def prompts_line(parts: PromptParts) -> str:
    """Write how many prompts each part has."""
    train, validation, heldout = map(len, parts)
    return f"prompts: {train:,} to train, {validation:,} to choose by, {heldout:,} held out"


def waiting_for_answers(recipe: Recipe, parts: PromptParts) -> list[Prompt]:
    """Return the prompts that have no answer in a recipe's folder."""
    path = recipe.responses_path
    kept = {response.id for response in iterate_responses(path)} if path.exists() else set()
    return [prompt for prompt in sum(parts, []) if prompt.id not in kept]


def answer_lines(parts: PromptParts, waiting: Sequence[Prompt]) -> list[str]:
    """Write how many prompts there are, and how many of them `dpace respond` will answer."""
    num_kept = sum(map(len, parts)) - len(waiting)
    return [prompts_line(parts), f"answers: {num_kept:,} kept, {len(waiting):,} to come"]


def size_lines(plan: TrainingPlan) -> list[str]:
    """Write what the training of a drafter is, and what it takes."""
    return [
        f"training: {count(plan.num_steps, 'step')}, "
        f"{count(plan.lengths.shape[1], 'conversation')} of {int(plan.lengths[0].mean()):,} tokens",
        f"drafter: {plan.drafter.num_parameters() / 1e6:.4g} M parameters; hidden states {plan.feature_place} "
        f"({size(plan.feature_bytes)})",
        f"memory: {size(sum(plan.memory(plan.batch()).values()))} of {size(plan.free_bytes)}",
        f"disk: up to {size(plan.disk_bytes)} for the drafter and its checkpoints",
    ]


def training_lines(plan: TrainingPlan, folders: Sequence[Path]) -> list[str]:
    """Write how many drafters a verb trains, and what each takes.

    `folders` are those of the drafters, finished ones too.

    Raises:
        ValueError: the disk has too little room for them; where a training goes on, that is not looked at.
    """
    waiting = [folder for folder in folders if not is_finished(folder)]
    needed = plan.disk_bytes * sum(not folder.exists() for folder in waiting)
    there = next(filter(Path.exists, Path(plan.recipe.output).absolute().parents))
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"drafters and checkpoints will take {size(needed)} in {plan.recipe.output}, and its disk has {size(free)} "
            "free; make room, or name another folder with --output"
        )
    drafters = f"drafters: {len(folders) - len(waiting)} kept, {len(waiting)} to come"
    return [drafters, *size_lines(plan)] if waiting else [drafters]


def comparison_lines(config: CompareConfig, parts: PromptParts, folders: Sequence[Path]) -> list[str]:
    """Write what `dpace compare` or `dpace demo` will do; see `training_lines`.

    Raises:
        ValueError: see there; or the drafter cannot work with this target.
    """
    plan = plan_recipe(config, expected_lengths(parts.train, config))
    return [prompts_line(parts), *training_lines(plan, folders)]


def plan_lines(recipe: Recipe, memory: int | None = None) -> list[str]:
    """Write what `dpace plan` says of a recipe: its answers, memory by part, disk, tokens, steps and time.

    Prompts that are not on this machine are not read: a batch of the longest conversations stands for them.

    Raises:
        ValueError: see `load_corpus`, `split_prompts` and `plan_recipe`.
    """
    answers = recipe.responses_path
    respond = recipe.respond
    waiting = []
    if read_meta(answers).get("complete"):
        lines = []
        lengths = known_lengths(choose_conversations(*load_corpus(answers, recipe.prompts), recipe)[0])
    elif recipe.prompts.path == "demo" or Path(recipe.prompts.path).exists():
        parts = split_prompts(recipe.prompts)
        waiting = waiting_for_answers(recipe, parts)
        lines = [*answer_lines(parts, waiting), "not all answers are there: each counts as long as the recipe allows"]
        lengths = expected_lengths(parts.train, recipe)
    else:
        lines = ["prompts are not on this machine: steps and time are of one batch of the longest conversations"]
        lengths = np.full((2, recipe.train.batch_size), float(recipe.train.max_length))
    plan = plan_recipe(recipe, lengths, memory=memory)
    if waiting and respond.source == "target" and not respond.server:
        lines.append(time_line("answering", plan.answering_seconds(expected_lengths(waiting, recipe))))
    parts = plan.memory(plan.batch())
    needed = sum(parts.values())
    lines += [
        *size_lines(plan),
        time_line("training", plan.seconds),
        "memory of a training step, computed:",
        *(f"  {part:<28} {size(number):>10}" for part, number in parts.items() if number),
        f"largest --train.batch-size that fits: {plan.largest_batch()}",
    ]
    if needed > plan.free_bytes:
        lines.append(
            f"does not fit in {size(plan.free_bytes)}: lower --train.batch-size, --train.num-anchors or "
            "--train.max-length, or set --train.gradient-checkpointing"
        )
    return lines
