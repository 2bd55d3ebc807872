"""Plan by formula what a training takes, before a weight is loaded, and write it in lines.

Models whose tensors have shapes only, and the lengths of the conversations come in; memory, time and disk go out, or
lines of at most 80 columns that a verb prints before it starts. Memory is a sum of named terms, as if all of them were
there at once. Time is operations over speed: of the products of matrices, and of such a product on this machine.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from pydantic import ByteSize
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import bytes_of_token
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.head_scores import chunk_bytes_of
from dpace.prompts.prompts import Prompt, PromptParts, prompts_line, split_prompts
from dpace.recipes import TARGETS
from dpace.respond.responses import iterate_responses, load_examples, read_meta
from dpace.system.device import default_dtype, find_device
from dpace.system.loading import translate_library_errors
from dpace.system.progress import count, note
from dpace.system.ranks import num_ranks
from dpace.target import Target
from dpace.target.files import auto_class, find_target_files
from dpace.target.head import LmHead
from dpace.target.locate import find_target
from dpace.training.loop import num_steps
from dpace.training.optimizer import is_factor, products_dtype
from dpace.training.run import choose_conversations, is_finished

Number = int | float
LIBRARY_BYTES = 2**29
"""Bytes of Python with its libraries in the memory of a CPU."""
CONTEXT_BYTES = 3 * 2**28
"""Bytes that CUDA's context and libraries are assumed to take on a GPU."""
UNCOUNTED_SHARE = 0.1
"""What the terms of a plan miss, as a share of their sum (docs/scale.md)."""
TEXT_BYTES_PER_TOKEN = 4
"""Bytes of a prompt's messages that a token of them has at least, on average: the names of their parts count too."""
DISTINCT_TOKENS = 10
"""Distinct tokens of a text, divided by the root of its length, as Heaps' law has them."""
KEPT_STATES = 2.25
"""Numbers of a slot that the backward pass reads, for as many weights as the target is wide."""
MUON_PRODUCTS = 25
"""Operations of an orthogonalization for each weight, divided by the width."""
SMALL_FILES = 2**25
"""Bytes of a drafter's files but weights and moments, at most: lists of tokens, and the logs of 20,000 steps."""
MOST_BATCH = 64
"""Largest batch that is tried."""
TIMING_SECONDS = 1.0
"""How long a product is timed."""
FEW_ROWS = 64
"""Rows of a product whose speed stands for what is no large product: as many as prompts that are answered together."""
BESIDE_PRODUCTS = 0.4
"""What a training step on a CPU does beside its products, as a share of these, at that speed."""
GPU_FLOPS = 3e14
"""Operations in a second by a GPU that is not at hand: a third of an H100's products in bf16."""


@cache
def measure_flops(device: torch.device, dtype: torch.dtype, num_rows: int = 512) -> Number:
    """Time a product, by default one as large as a training's, and return operations a second."""
    if device.type != "cpu" and not torch.accelerator.is_available():
        return GPU_FLOPS
    rows = torch.ones(num_rows, 2**11, device=device, dtype=dtype)
    weights = torch.ones(2**11, 2**10, device=device, dtype=dtype)
    timer = Timer("rows @ weights", globals=locals(), num_threads=torch.get_num_threads())
    # The least time is the one that other programs disturbed least.
    seconds = min(timer.blocked_autorange(min_run_time=TIMING_SECONDS).times)
    # A product is a multiplication and an addition for each row and weight.
    return 2 * len(rows) * weights.numel() / seconds


def expected_step_seconds(
    operations: Number, device: torch.device, products: torch.dtype, dtype: torch.dtype
) -> Number:
    """Estimate the seconds of training steps from the operations of their products.

    Args:
        operations: a multiplication and an addition are two.
        device: where the steps are taken.
        products: dtype of the factors in large products.
        dtype: of the target.
    """
    seconds = operations / measure_flops(device, products)
    if device.type == "cpu":
        seconds += BESIDE_PRODUCTS * operations / measure_flops(device, dtype, FEW_ROWS)
    return seconds


class PaperTarget(Target):
    """A target whose tensors have shapes and no values; that embedding and head are plain tables is not looked at."""

    cache_ability: Any = "crop"
    stop_token_ids: Any = ()

    def _find_tables(self) -> tuple[float, LmHead]:
        return 1.0, LmHead(self.model.get_output_embeddings().weight)


def known_lengths(dataset: ResponseDataset) -> np.ndarray:
    """Return tokens and anchors of conversations that are answered, "2 conversation"."""
    anchors = [example.num_anchors(dataset.max_length) for example in dataset.examples]
    return np.stack([dataset.lengths, anchors]).astype(float)


def expected_lengths(prompts: Sequence[Prompt], recipe: Recipe) -> np.ndarray:
    """Estimate what `known_lengths` will be, at most: from the prompts' texts, with answers as long as they may be."""
    asked = [len(str(prompt.turns).encode()) / TEXT_BYTES_PER_TOKEN for prompt in prompts]
    answered = [len(prompt.turns) * recipe.respond.max_new_tokens for prompt in prompts]
    return np.array([np.add(asked, answered), answered], float)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training takes; neither target nor drafter need values."""

    recipe: Recipe
    device: torch.device
    free_bytes: int
    """Memory that is free there."""
    target: Target
    drafter: Drafter
    lengths: np.ndarray
    """Tokens and anchors of the conversations, "2 conversation"."""
    ranks: int = field(default_factory=num_ranks)
    """Processes that train together."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return num_steps(self.recipe.train, self.lengths.shape[1], self.ranks)

    @property
    def batch_size(self) -> int:
        """Conversations in a micro-batch."""
        return min(self.recipe.train.batch_size, self.lengths.shape[1])

    @property
    def num_moments(self) -> int:
        """Numbers that the optimizer keeps: two for each weight, and Muon one, but for tables of tokens."""
        is_muon = self.recipe.train.optimizer == "muon"
        num_moments = 0
        for name, parameter in self.drafter.named_parameters():
            has_one = is_muon and is_factor(name, parameter)
            num_moments += parameter.numel() * (1 if has_one else 2)
        return num_moments

    @property
    def num_rows(self) -> int:
        """Tokens that the softmax covers."""
        num_tokens = len(self.target.head.weight)
        if self.recipe.loss.vocabulary == "all":
            return num_tokens
        return min(num_tokens, int(DISTINCT_TOKENS * self.lengths[0].sum() ** 0.5))

    def token_bytes(self, dtype: str = "target") -> int:
        """Return the bytes of a token's features, where a step reads them or as they are kept on disk."""
        num_layers = len(self.drafter.target_layer_ids)
        return bytes_of_token(self.target, num_layers, dtype, with_head_input=self.recipe.needs_target_hidden)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of all conversations, where they are kept."""
        return int(self.lengths[0].sum() * self.token_bytes(self.recipe.train.feature_dtype))

    @property
    def feature_place(self) -> str:
        """Where the features of all conversations are: `on disk`, `kept` in memory, or `computed in every step`."""
        train = self.recipe.train
        if train.feature_files:
            return "on disk"
        if self.feature_bytes <= train.feature_cache_gib * 2**30:
            return "kept"
        return "computed in every step"

    def sizes(self, summary: Callable[[np.ndarray], Number]) -> tuple[Number, Number]:
        """Return tokens, and slots of blocks, of the largest conversation with `np.max`, of the mean with `np.mean`."""
        tokens, anchors = self.lengths
        num_blocks = summary(anchors.clip(max=self.recipe.train.num_anchors))
        return summary(tokens), num_blocks * self.drafter.block_size

    def memory(self, batch_size: int) -> dict[str, Number]:
        """Compute the bytes of a step by part, with a micro-batch of the largest conversations; together a bound.

        A rank among several has a whole drafter and a whole target here.
        """
        num_tokens, num_slots = self.sizes(np.max)
        head = self.target.head.weight
        of_target = self.target.model.num_parameters()
        of_drafter = self.drafter.num_parameters()
        item_bytes = products_dtype(self.recipe.train, self.device).itemsize
        slots = batch_size * num_slots
        states = 4 * slots * self.target.hidden_size  # hidden states of all slots, in fp32
        # A matrix of `width x n` weights makes n numbers of a slot, so weights are divided by the width.
        activations = KEPT_STATES * item_bytes * slots * of_drafter / self.target.hidden_size
        num_layers = len(self.drafter.layers)
        is_cpu = self.device.type == "cpu"
        if is_cpu:  # whose attention has its mask as numbers
            activations += 4 * num_layers * slots * (num_tokens + num_slots)
        if self.recipe.train.gradient_checkpointing:
            # One layer at a time is computed again, from the states before it.
            activations = activations / num_layers + num_layers * states
        chunk_bytes = chunk_bytes_of(self.recipe.loss, head, is_cpu=is_cpu)
        tile_bytes = min(chunk_bytes, 4 * slots * self.num_rows)  # of logits, in fp32
        # The weights are in fp32; for products in 16 bits there is a copy of them.
        weight_bytes = 4
        if item_bytes < 4:
            weight_bytes += item_bytes
        parts = {
            "target": of_target * head.itemsize,
            "its copies in 16 bits": 0,
            "drafter": of_drafter * weight_bytes,
            "optimizer's moments": 4 * self.num_moments,
            "gradient": 4 * of_drafter,
            "gradient for other ranks": 4 * of_drafter * (self.ranks > 1),
            "hidden states": batch_size * num_tokens * self.token_bytes(),
            "hidden states that are kept": 0,
            "activations of the drafter": activations,
            "loss through the head": 3 * states + 2 * tile_bytes,
            "libraries": CONTEXT_BYTES,
        }
        if is_cpu:
            parts["libraries"] = LIBRARY_BYTES
            if head.itemsize == 4:
                parts["its copies in 16 bits"] = 2 * of_target
            if self.feature_place == "kept":
                parts["hidden states that are kept"] = self.feature_bytes
        return parts | {"what is not counted": UNCOUNTED_SHARE * sum(parts.values())}

    def largest_batch(self) -> int:
        """Return how many conversations of a micro-batch fit into the memory, `MOST_BATCH` at most."""
        # The memory grows with the batch: the first that does not fit ends the search.
        batch_size = 0
        while batch_size < MOST_BATCH and sum(self.memory(batch_size + 1).values()) <= self.free_bytes:
            batch_size += 1
        return batch_size

    def flops(self) -> tuple[Number, Number]:
        """Compute the operations of an optimizer step on mean conversations: of the target that reads, and of all else.

        Of experts, those that are not chosen count too; attention is left out.
        """
        train = self.recipe.train
        width = self.target.hidden_size
        num_weights = self.drafter.num_parameters()
        num_tokens, num_slots = self.sizes(np.mean)
        # The target is read up to the last layer of the features, or whole where the loss needs its predictions.
        last = None
        if not self.recipe.needs_target_hidden:
            last = max(self.drafter.target_layer_ids) + 1
        read = sum(weight.numel() for weight in self.target.layers[:last].parameters())
        # Forward, and backward to the weights and to what comes in; checkpointing goes forward twice.
        passes = 4 if train.gradient_checkpointing else 3
        # The head is not trained, and logits of the target are one product more.
        head_passes = 3 if self.recipe.loss.needs_target_probs else 2
        trained = passes * num_weights + head_passes * self.num_rows * width
        twice = 2 * self.batch_size * train.gradient_accumulation_steps  # a multiplication and an addition
        reading = twice * num_tokens * read
        training = twice * num_slots * trained
        if train.optimizer == "muon":
            training += MUON_PRODUCTS * width * num_weights
        return reading, training

    @property
    def seconds(self) -> Number:
        """Estimate the seconds of a whole training, without the time in which tau is measured."""
        return self.seconds_of_reading + self.seconds_of_steps

    @property
    def seconds_of_reading(self) -> Number:
        """Estimate the seconds in which the target reads conversations."""
        train = self.recipe.train
        reading, _ = self.flops()
        num_read = self.num_steps
        if self.feature_place != "computed in every step":
            # Each conversation once: as much as in the steps of one epoch.
            num_read = self.lengths.shape[1] / (self.batch_size * train.gradient_accumulation_steps)
        return num_read * reading / measure_flops(self.device, self.target.model.dtype)

    @property
    def seconds_of_steps(self) -> Number:
        """Estimate the seconds of all steps, without the time in which the target reads."""
        operations = self.num_steps * self.flops()[1]
        products = products_dtype(self.recipe.train, self.device)
        return expected_step_seconds(operations, self.device, products, self.target.model.dtype)

    def steps_in(self, seconds: float) -> int:
        """Return how many steps end in so many seconds, by the estimate; at least one."""
        seconds_of_steps = self.seconds_of_steps
        if self.feature_place == "computed in every step":
            seconds_of_steps += self.seconds_of_reading
        else:
            seconds -= self.seconds_of_reading  # before the first step
        return max(1, int(seconds * self.num_steps / seconds_of_steps))

    @property
    def disk_bytes(self) -> int:
        """Bytes of a drafter's folder, at most: three checkpoints, since one is written beside two; and the drafter."""
        num_weights = self.drafter.num_parameters()
        # 4 bytes in each of three checkpoints, and 2 bytes in the finished drafter.
        return 12 * (num_weights + self.num_moments) + 2 * num_weights + SMALL_FILES


def find_config(name: str) -> Any:
    """Read the config of a target; of one that is not on this machine, the one in `recipes/targets/` if there is one.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: the name stands for no target, as in `find_target` and `find_target_files`.
    """
    sizes = Path(f"{TARGETS}/{name}")
    is_here = Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if is_here or not sizes.exists():
        return find_target_files(find_target(name)).config
    note(f"{name} is not on this machine; the plan takes its sizes, which come with dpace")
    return AutoConfig.from_pretrained(sizes)


def plan_recipe(
    recipe: Recipe, lengths: np.ndarray, *, memory: int | None = None, init: Drafter | None = None, config: Any = None
) -> TrainingPlan:
    """Plan a recipe from the target's config and the drafter to start from, on this machine or on one with this memory.

    The config is looked for where none is given.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: a config that transformers does not know, or that its own class refuses; a drafter that cannot work
            with this target; or see `find_target` and `find_device`.
    """
    # A plan for the memory of a GPU needs none here.
    is_here = memory is None or recipe.device == "cpu" or torch.accelerator.is_available()
    device = find_device(recipe.device) if is_here else torch.device("cuda")
    if memory is None:
        if device.type == "cpu":
            memory = psutil.virtual_memory().available
        else:
            memory = torch.accelerator.get_memory_info(device)[0]
    dtype = getattr(torch, recipe.dtype, default_dtype(device))  # `auto` is no dtype
    # Before the block below: a search may download weights and read them, which no meta device can.
    config = config or find_target_files(find_target(recipe.target)).config
    fix = "name the folder or the Hub id of a causal LM"
    with translate_library_errors(f"the config of {recipe.target}", fix), torch.device("meta"):
        auto: Any = auto_class(config) or AutoModelForCausalLM  # which says what it knows
        target = PaperTarget(auto.from_config(config, dtype=dtype, attn_implementation="eager"))
    with torch.device("meta"):
        drafter = Drafter(init.config) if init else Drafter.from_target(target, **vars(recipe.drafter))
    return TrainingPlan(recipe, device, memory, target, drafter, lengths.clip(1, recipe.train.max_length))


def size(num_bytes: Number) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    return ByteSize(num_bytes).human_readable(separator=" ")


def answer_lines(recipe: Recipe, parts: PromptParts) -> list[str]:
    """Write how many prompts there are, and how many of them `dpace respond` will answer."""
    path = recipe.responses_path
    answered = set()
    if path.exists():
        answered = {response.id for response in iterate_responses(path)}
    num_prompts = sum(map(len, parts))
    num_kept = sum(prompt.id in answered for prompt in chain.from_iterable(parts))
    return [prompts_line(parts), f"answers: {num_kept:,} kept, {num_prompts - num_kept:,} to come"]


def size_lines(plan: TrainingPlan) -> list[str]:
    """Write what the training of a drafter is, and what it takes."""
    return [
        f"training: {count(plan.num_steps, 'step')}, "
        f"{count(plan.lengths.shape[1], 'conversation')} of {int(plan.lengths[0].mean()):,} tokens",
        f"drafter: {plan.drafter.num_parameters() / 1e6:.4g} M parameters; hidden states {plan.feature_place} "
        f"({size(plan.feature_bytes)})",
        f"memory: {size(sum(plan.memory(plan.batch_size).values()))} of {size(plan.free_bytes)}",
        f"disk: up to {size(plan.disk_bytes)} for the drafter and its checkpoints",
    ]


def training_lines(plan: TrainingPlan, folders: Sequence[Path]) -> list[str]:
    """Write how many drafters a verb trains, and what each takes.

    `folders` has the folder of each drafter, also of finished ones.

    Raises:
        ValueError: the disk has too little room for them; where a training goes on, that is not looked at.
    """
    waiting = [folder for folder in folders if not is_finished(folder)]
    num_new = sum(not folder.exists() for folder in waiting)
    needed = num_new * plan.disk_bytes
    # The folders may be new, but some folder above them is there.
    there = next(filter(Path.exists, folders[0].absolute().parents))
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"drafters and checkpoints will take {size(needed)} in {plan.recipe.output}, and its disk has {size(free)} "
            "free; make room, or name another folder with --output"
        )
    lines = [f"drafters: {len(folders) - len(waiting)} kept, {len(waiting)} to come"]
    if waiting:
        lines += size_lines(plan)
    return lines


def comparison_lines(plan: TrainingPlan, parts: PromptParts, folders: Sequence[Path]) -> list[str]:
    """Write what `dpace compare` or `dpace demo` will do.

    Raises:
        ValueError: the disk has too little room, as in `training_lines`.
    """
    return [prompts_line(parts), *training_lines(plan, folders)]


def plan_lines(
    recipe: Recipe, memory: int | None, init: Drafter | None, ranks: int | None, minutes: float | None
) -> list[str]:
    """Write what `dpace plan` says of a recipe: its answers, memory by part, disk, tokens, steps and time.

    Prompts that are not on this machine are not read: a batch of the longest conversations stands for them.

    Raises:
        ValueError: see `load_examples`, `split_prompts` and `plan_recipe`.
    """
    answers = recipe.responses_path
    if read_meta(answers).get("complete"):
        lines = []
        lengths = known_lengths(choose_conversations(*load_examples(answers, recipe.prompts), recipe)[0])
    elif recipe.prompts.path == "demo" or Path(recipe.prompts.path).exists():
        parts = split_prompts(recipe.prompts)
        lines = [*answer_lines(recipe, parts), "not all answers are there: each counts as long as the recipe allows"]
        lengths = expected_lengths(parts.train, recipe)
    else:
        lines = ["prompts are not on this machine: steps and time are of one batch of the longest conversations"]
        lengths = np.full((2, recipe.train.batch_size), float(recipe.train.max_length))
    plan = plan_recipe(recipe, lengths, memory=memory, init=init, config=find_config(recipe.target))
    if ranks is not None:
        plan = replace(plan, ranks=ranks)
    parts_of_memory = plan.memory(plan.batch_size)
    lines += size_lines(plan)
    lines.append(f"training: about {timedelta(seconds=round(plan.seconds))}")
    lines.append("memory of a training step, computed:")
    for name, num_bytes in parts_of_memory.items():
        if num_bytes:
            lines.append(f"  {name:<28} {size(num_bytes):>10}")
    lines.append(f"largest --train.batch-size that fits: {plan.largest_batch()}")
    if minutes:
        steps = plan.steps_in(60 * minutes)
        lines.append(f"in {minutes:g} minutes: --train.max-steps {steps} --train.eval-steps {max(1, steps // 4)}")
    if plan.ranks > 1:
        of_others = 1 - 1 / plan.ranks
        # Both gradients and the moments, in fp32; a copy of the weights stays whole.
        trained = 8 * plan.drafter.num_parameters() + 4 * plan.num_moments
        layers = sum(weight.nbytes for weight in plan.target.layers.parameters())
        lines.append(
            f"a rank of {plan.ranks} takes {size(of_others * trained)} less with `accelerate launch --use_fsdp`,\n"
            f"and {size(of_others * layers)} less with --train.target-shard fsdp"
        )
    if sum(parts_of_memory.values()) > plan.free_bytes:
        lines.append(
            f"does not fit in {size(plan.free_bytes)}: lower --train.batch-size, --train.num-anchors or "
            "--train.max-length, or set --train.gradient-checkpointing where it is not set"
        )
    return lines
