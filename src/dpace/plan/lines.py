"""Write what a recipe takes in lines of at most 80 columns, which verbs print before they start.

A recipe or its plan comes in: `dpace plan` writes all of it, and the verbs that answer and train their parts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache
from pydantic import ByteSize
from transformers import AutoConfig

from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.engines import all_engines, engine_of
from dpace.plan.speed import Number, measure_flops
from dpace.plan.training import TrainingPlan, expected_lengths, known_lengths, plan_recipe
from dpace.prompts.prompts import PromptParts, prompts_line, split_prompts
from dpace.recipes import TARGETS
from dpace.respond.responses import Example, iterate_responses, load_examples, read_meta
from dpace.system.progress import count, note, shorten
from dpace.target.files import find_target_files
from dpace.training.run import choose_conversations, is_finished


def size(num_bytes: Number) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    return ByteSize(num_bytes).human_readable(separator=" ")


def answer_lines(recipe: Recipe, parts: PromptParts) -> list[str]:
    """Write how many prompts there are, and how many of them `dpace respond` will answer.

    Of a GGUF file for which llama.cpp, which serves it, cannot draft, that is said too.
    """
    path = recipe.responses_path
    answered = set()
    if path.exists():
        answered = {response.id for response in iterate_responses(path)}
    num_prompts = sum(map(len, parts))
    num_kept = sum(prompt.id in answered for prompt in chain.from_iterable(parts))
    lines = [prompts_line(parts), f"answers: {num_kept:,} kept, {num_prompts - num_kept:,} to come"]
    if Path(recipe.target).is_file():
        kind = find_target_files(recipe.target).config.model_type
        if engine_of("gguf").target_fault(kind):
            lines.append(f"llama.cpp cannot draft for {kind}; `dpace generate` can: see docs/laptop.md")
    return lines


def engine_lines(plan: TrainingPlan) -> list[str]:
    """Write which engines read the drafter where not all do, and what pleases the others."""
    engines = all_engines()
    readers = [engine.title for engine in engines if not engine.fault(plan.drafter.spec)]
    if len(readers) == len(engines):
        return []
    flags = {"--drafter.selector None": plan.recipe.drafter.selector, "--drafter.no-causal": plan.recipe.drafter.causal}
    wanted = " ".join(flag for flag, is_set in flags.items() if is_set)
    return [f"read by {', '.join(['dpace', *readers])}; for all engines:", f"  {wanted or 'see docs/serve.md'}"]


def size_lines(plan: TrainingPlan) -> list[str]:
    """Write what the training of a drafter is, and what it takes."""
    return [
        f"training: {count(plan.num_steps, 'step')}, "
        f"{count(plan.lengths.shape[1], 'conversation')} of {int(plan.lengths[0].mean()):,} tokens",
        f"drafter: {plan.drafter.num_parameters() / 1e6:.4g} M parameters; hidden states {plan.feature_place} "
        f"({size(plan.feature_bytes)})",
        f"memory: {size(sum(plan.memory(plan.batch_size).values()))} of {size(plan.free_bytes)}",
        f"disk: up to {size(plan.disk_bytes)} for the drafter and its checkpoints",
        *engine_lines(plan),
    ]


def training_lines(plan: TrainingPlan, folders: Sequence[Path]) -> list[str]:
    """Write how many drafters a verb trains, and what each takes.

    `folders` has the folder of each drafter, also of finished ones.
    """
    waiting = [folder for folder in folders if not is_finished(folder)]
    lines = [f"drafters: {len(folders) - len(waiting)} kept, {len(waiting)} to come"]
    if waiting:
        lines += size_lines(plan)
    return lines


def set_line(parts: PromptParts) -> str:
    """Write how many prompts of each set there are to train on."""
    sets = Counter(prompt.set for prompt in parts.train)
    named = ", ".join(f"{name} {number:,}" for name, number in sets.most_common())
    return shorten(f"sets to train on: {named}", 80)


def length_lines(examples: Sequence[Example], recipe: Recipe) -> list[str]:
    """Write how long answers and conversations are, and how many of them are cut or left out."""
    answers = [end - start for example in examples for start, end in example.spans]
    conversations = [len(example.token_ids) for example in examples]
    limit = read_meta(recipe.responses_path).get("max_new_tokens", 0)
    max_length = recipe.train.max_length
    num_cut = sum(length > max_length for length in conversations)
    num_without = sum(not example.num_anchors(max_length) for example in examples)
    return [
        f"answers: {len(answers):,} of {median(answers):,.0f} tokens in the median, {max(answers):,} at most",
        f"  ending at --respond.max-new-tokens {limit}: {answers.count(limit):,}",
        f"conversations: {len(examples):,} of {median(conversations):,.0f}, {max(conversations):,} at most",
        f"  cut at --train.max-length {max_length}: {num_cut:,}",
        f"  left out, without two tokens of an answer in a row: {num_without:,}",
    ]


def data_lines(recipe: Recipe) -> tuple[list[str], np.ndarray]:
    """Write what the prompts and answers of a recipe are; return tokens and anchors as in `known_lengths` too.

    Prompts that are not on this machine are not read: a batch of the longest conversations stands for them.

    Raises:
        ValueError: see `split_prompts`, `load_examples` and `choose_conversations`.
    """
    is_answered = read_meta(recipe.responses_path).get("complete")
    if not is_answered and recipe.prompts.path != "demo" and not Path(recipe.prompts.path).exists():
        line = "prompts are not on this machine: steps and time are of one batch of the longest conversations"
        return [line], np.full((2, recipe.train.batch_size), float(recipe.train.max_length))
    parts = split_prompts(recipe.prompts)
    if not is_answered:
        line = "not all answers are there: each counts as long as the recipe allows"
        return [*answer_lines(recipe, parts), set_line(parts), line], expected_lengths(parts.train, recipe)
    examples, _ = load_examples(recipe.responses_path, parts)
    dataset, _ = choose_conversations(examples, [], recipe)
    return [prompts_line(parts), set_line(parts), *length_lines(examples, recipe)], known_lengths(dataset)


def memory_lines(plan: TrainingPlan) -> list[str]:
    """Write the memory of a training step by part, and the largest batch."""
    lines = ["memory of a training step, computed:"]
    for name, num_bytes in plan.memory(plan.batch_size).items():
        if num_bytes:
            lines.append(f"  {name:<28} {size(num_bytes):>10}")
    return [*lines, f"largest --train.batch-size that fits: {plan.largest_batch() or 'none'}"]


def find_config(name: str) -> Any:
    """Read the config of a target; of one that is not on this machine, the one in `recipes/targets/` if there is one.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: the name stands for no target, as in `find_target_files`.
    """
    sizes = Path(f"{TARGETS}/{name}")
    is_here = Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if is_here or not sizes.exists():
        return find_target_files(name).config
    note(f"{name} is not on this machine; the plan takes its sizes, which come with dpace")
    return AutoConfig.from_pretrained(sizes)


def plan_lines(
    recipe: Recipe, memory: int | None, init: Drafter | None, ranks: int | None, minutes: float | None
) -> list[str]:
    """Write what `dpace plan` says of a recipe: prompts and answers, memory by part, disk, tokens, steps and time.

    Raises:
        ValueError: see `data_lines` and `plan_recipe`.
    """
    lines, lengths = data_lines(recipe)
    plan = plan_recipe(recipe, lengths, memory=memory, init=init, config=find_config(recipe.target))
    if ranks is not None:
        plan = replace(plan, ranks=ranks)
    lines += [
        *size_lines(plan),
        f"training: about {timedelta(seconds=round(plan.seconds))}, with "
        # Of a GPU that is not here, what is assumed.
        f"{measure_flops(plan.device, plan.target.model.dtype):.0e} operations a second",
        *memory_lines(plan),
    ]
    if minutes:
        steps = plan.steps_in(60 * minutes)
        lines.append(f"in {minutes:g} minutes: --train.max-steps {steps} --train.eval-steps {max(1, steps // 4)}")
    if sum(plan.memory(plan.batch_size).values()) > plan.free_bytes:
        lines.append(
            f"does not fit in {size(plan.free_bytes)}: lower --train.batch-size, --train.num-anchors or "
            "--train.max-length, or set --train.gradient-checkpointing where it is not set"
        )
    return lines
