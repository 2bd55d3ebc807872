"""Compute memory, operations, time and disk of a training from sizes alone.

Models whose tensors have shapes only, and the lengths of the conversations come in. Memory is a sum of named terms, as
if all of them were there at once. Time is operations over speed: of the products of matrices, and of such a product on
this machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import bytes_of_token
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.head_scores import chunk_bytes_of
from dpace.plan.speed import Number, expected_step_seconds, measure_flops
from dpace.prompts.prompts import Prompt
from dpace.system.device import default_dtype, find_device
from dpace.system.loading import translate_library_errors
from dpace.system.ranks import num_ranks
from dpace.target import Target
from dpace.target.files import auto_class, find_target_files
from dpace.target.head import LmHead
from dpace.training.loop import num_steps
from dpace.training.optimizer import is_factor, products_dtype

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


class PaperTarget(Target):
    """A target whose tensors have shapes and no values; what only values tell is not looked at."""

    def _find_tables(self) -> tuple[float, LmHead]:
        return 1.0, LmHead(self.model.get_output_embeddings().weight)

    @cached_property
    def can_take_back(self) -> bool:
        """As if drafts could be verified."""
        return True

    @property
    def stop_token_ids(self) -> list[int]:
        """None, so that the mask token, which needs a tokenizer, may be any."""
        return []


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

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's features."""
        num_layers = len(self.drafter.target_layer_ids)
        return bytes_of_token(self.target, num_layers, with_head_input=self.recipe.needs_target_hidden)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of all conversations, where they are kept."""
        return int(self.lengths[0].sum() * self.token_bytes)

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
        has_copies = item_bytes < 4  # of the drafter's weights, which are in fp32
        is_kept = is_cpu and self.feature_place == "kept"
        parts = {
            "target": of_target * head.itemsize,
            "its copies in 16 bits": 2 * of_target * (is_cpu and head.itemsize == 4),
            "drafter": of_drafter * (4 + item_bytes * has_copies),
            "optimizer's moments": 4 * self.num_moments,
            "gradient": 4 * of_drafter,
            "gradient for other ranks": 4 * of_drafter * (self.ranks > 1),
            "hidden states": batch_size * num_tokens * self.token_bytes,
            "hidden states that are kept": self.feature_bytes * is_kept,
            "activations of the drafter": activations,
            "loss through the head": 3 * states + 2 * tile_bytes,
            "libraries": LIBRARY_BYTES if is_cpu else CONTEXT_BYTES,
        }
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


def plan_recipe(
    recipe: Recipe, lengths: np.ndarray, *, memory: int | None = None, init: Drafter | None = None, config: Any = None
) -> TrainingPlan:
    """Plan a recipe from the target's config and the drafter to start from, on this machine or on one with this memory.

    The config is looked for where none is given.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: a config that transformers does not know, or that its own class refuses; a drafter that cannot work
            with this target; or see `find_target_files` and `find_device`.
    """
    # A plan for the memory of a GPU needs none here.
    is_here = memory is None or recipe.device == "cpu" or torch.accelerator.is_available()
    device = find_device(recipe.device) if is_here else torch.device("cuda")
    if memory is None:
        if device.type == "cpu":
            memory = psutil.virtual_memory().available
        else:
            memory = torch.accelerator.get_memory_info(device)[0]
    # `auto` is no dtype, and a target in 8 bits gives fp32.
    dtype = getattr(torch, recipe.dtype.replace("int8", "float32"), default_dtype(device))
    # Before the block below: a search may download weights and read them, which no meta device can.
    config = config or find_target_files(recipe.target).config
    fix = "name the folder or the Hub id of a causal LM"
    with translate_library_errors(f"the config of {recipe.target}", fix), torch.device("meta"):
        auto: Any = auto_class(config) or AutoModelForCausalLM  # which says what it knows
        target = PaperTarget(auto.from_config(config, dtype=dtype, attn_implementation="eager"))
    # No size follows from the scale of the norm, which `auto` finds in weights.
    options = vars(replace(recipe.drafter, norm_scale=1.0))
    with torch.device("meta"):
        drafter = Drafter(init.config) if init else Drafter.from_target(target, **options)
    return TrainingPlan(recipe, device, memory, target, drafter, lengths.clip(1, recipe.train.max_length))
