"""Plan by formula what answers and a training take, before a weight is loaded: memory, time and disk.

Models whose tensors have shapes only, and the lengths of the conversations come in; numbers go out. Memory is a sum of
named terms, as if all of them were there at once. Time is operations over speed: those of products of matrices, and the
speed of such a product on this machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import bytes_of_token
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.head_scores import default_chunk_bytes
from dpace.prompts.prompts import Prompt
from dpace.system.device import default_dtype, find_device
from dpace.system.loading import translate_library_errors
from dpace.system.ranks import num_ranks
from dpace.target import Target
from dpace.target.files import auto_class, find_target_files
from dpace.target.head import LmHead
from dpace.target.locate import find_target
from dpace.train.loop import num_steps
from dpace.train.optimizer import is_factor, products_dtype

Number = int | float
CONTEXT_BYTES = 3 * 2**28
"""Bytes that CUDA's context and libraries are assumed to take on a GPU."""
BYTES_PER_TOKEN = 4
"""Bytes of a prompt's messages that a token of them has at least, on average: the names of their parts count too."""
DISTINCT_TOKENS = 10
"""Distinct tokens of a text, divided by the root of its length, as Heaps' law has them."""
KEPT_STATES = 1.5
"""Numbers that the backward pass reads, over those that products read and give: norms and activations keep theirs."""
SMALL_FILES = 2**25
"""Bytes of a drafter's files but weights and moments, at most: lists of tokens, and the logs of 20,000 steps."""
MOST_BATCH = 64
"""Largest batch that is tried."""
NUM_ROWS = 512
"""Rows of the product that is as fast as a training's."""
FEWEST_ROWS = 32
"""Rows of the narrowest product that is measured; one of fewer takes as long on a GPU, and less on a CPU."""
GPU_FLOPS, GPU_WEIGHTS = 3e14, 1e12
"""Operations, and weights that are read, in a second by a GPU that is not at hand: a third of an H100's products in
bf16, and the speed of its memory."""


@cache
def measure_flops(device: torch.device, dtype: torch.dtype, num_rows: int) -> Number:
    """Time a product of rows with weights, and return operations a second.

    The fewer the rows, the more weights there are, which no cache holds: that time is spent on reading them.
    """
    if device.type != "cpu" and not torch.accelerator.is_available():
        return min(GPU_FLOPS, 2 * num_rows * GPU_WEIGHTS)
    rows = torch.ones(num_rows, 2**11, device=device, dtype=dtype)
    weights = torch.ones(2**11, 2**19 // num_rows, device=device, dtype=dtype)
    timer = Timer("rows @ weights", globals=locals(), num_threads=torch.get_num_threads())
    seconds = min(timer.blocked_autorange(min_run_time=0.2).times)  # which other programs disturb least
    return 2 * num_rows * weights.numel() / seconds


class PaperTarget(Target):
    """A target whose tensors have shapes and no values; that embedding and head are plain tables is not looked at."""

    cache_ability: Any = "crop"
    stop_token_ids: Any = ()

    def _find_tables(self) -> tuple[float, LmHead]:
        return 1.0, LmHead(self.model.get_output_embeddings().weight)


def known_lengths(dataset: ResponseDataset) -> np.ndarray:
    """Return tokens and anchors of conversations that are answered, "2 conversation"."""
    anchors = dataset.corpus.num_anchors(dataset.max_length)
    return np.stack([dataset.lengths, anchors]).astype(float)


def expected_lengths(prompts: Sequence[Prompt], recipe: Recipe) -> np.ndarray:
    """Estimate what `known_lengths` will be, at most: from the prompts' texts, with answers as long as they may be."""
    asked = [len(str(prompt.turns).encode()) / BYTES_PER_TOKEN for prompt in prompts]
    answered = [len(prompt.turns) * recipe.respond.max_new_tokens for prompt in prompts]
    return np.array([np.add(asked, answered), answered], float)


class Batch(NamedTuple):
    """A micro-batch, all of whose blocks are full."""

    size: int
    """Conversations."""
    num_tokens: Number
    """Tokens of each."""
    num_slots: Number
    """Slots of the blocks of each."""


@dataclass(frozen=True)
class TrainingPlan:
    """What answers and a training take; neither target nor drafter need values."""

    recipe: Recipe
    device: torch.device
    free_bytes: int
    """Memory that is free there."""
    target: Target
    drafter: Any
    lengths: np.ndarray
    """Tokens and anchors of the conversations, "2 conversation"."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return num_steps(self.recipe.train, self.lengths.shape[1], num_ranks())

    @property
    def products(self) -> torch.dtype:
        """Precision of the products in which the drafter is trained."""
        return products_dtype(self.recipe.train, self.device)

    @property
    def num_moments(self) -> int:
        """Numbers that the optimizer keeps: two for each weight, and Muon one; its second ones of vectors are few."""
        return self.drafter.num_parameters() * (1 if self.recipe.train.optimizer == "muon" else 2)

    @property
    def num_rows(self) -> int:
        """Tokens that the softmax covers."""
        num_tokens = len(self.target.head.weight)
        if self.recipe.loss.vocabulary == "all":
            return num_tokens
        return min(num_tokens, int(DISTINCT_TOKENS * self.lengths[0].sum() ** 0.5))

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's features where a training reads them."""
        num_layers = len(self.drafter.target_layer_ids) + self.recipe.needs_target_hidden
        return bytes_of_token(self.target, num_layers, self.recipe.train.feature_dtype)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of all conversations."""
        return int(self.lengths[0].sum() * self.token_bytes)

    @property
    def feature_place(self) -> str:
        """Where the features of all conversations are, see `keep_features`."""
        train = self.recipe.train
        if train.feature_files:
            return "on disk"
        return "kept" if self.feature_bytes <= train.feature_cache_gib * 2**30 else "computed in every step"

    def batch(self, summary: Any = np.max) -> Batch:
        """Return the largest micro-batch, or with `np.mean` the mean one."""
        train = self.recipe.train
        tokens, anchors = self.lengths
        num_slots = summary(anchors.clip(max=train.num_anchors)) * self.drafter.block_size
        return Batch(min(train.batch_size, len(tokens)), float(summary(tokens)), float(num_slots))

    def matrices(self, batch: Batch) -> list[tuple[Number, int, int]]:
        """List the sizes of each matrix of the drafter, behind the rows that a micro-batch multiplies with it."""
        found = []
        selector = self.drafter.selector
        for name, weight in self.drafter.named_parameters():
            rows = batch.num_slots
            if name.startswith(f"{selector.name}."):
                rows *= selector.num_candidates
            elif name == "fc.weight":
                rows = batch.num_tokens
            elif "k_proj" in name or "v_proj" in name:
                rows += batch.num_tokens
            if is_factor(name, weight):
                found.append((batch.size * rows, *weight.shape))
        return found

    def memory(self, batch: Batch) -> dict[str, Number]:
        """Compute the bytes of a step by part."""
        is_cpu, head, loss = self.device.type == "cpu", self.target.head.weight, self.recipe.loss
        num_layers, item = len(self.drafter.layers), self.products.itemsize
        slots = batch.size * batch.num_slots
        states = 4 * slots * self.target.hidden_size
        activations = KEPT_STATES * item * sum(rows * (out + of) for rows, out, of in self.matrices(batch))
        if self.recipe.train.gradient_checkpointing:
            activations = activations / num_layers + num_layers * states
        chunk = default_chunk_bytes(head, is_cpu=is_cpu, is_soft=loss.needs_target_probs)
        tiles = min(loss.chunk_mib * 2**20 if loss.chunk_mib else chunk, 4 * slots * self.num_rows)
        of_target, of_drafter = self.target.model.num_parameters(), self.drafter.num_parameters()
        return {
            "target": of_target * head.itemsize,
            "its copies in 16 bits": 2 * of_target if is_cpu and head.itemsize == 4 else 0,
            "drafter": of_drafter * (4 if item == 4 else 4 + item),
            "optimizer's moments": 4 * self.num_moments,
            "gradient": 4 * of_drafter,
            "hidden states": batch.size * batch.num_tokens * self.token_bytes,
            "hidden states that are kept": self.feature_bytes if is_cpu and self.feature_place == "kept" else 0,
            "activations of the drafter": activations,
            "loss through the head": 3 * states + 2 * tiles,
            "CUDA's context": 0 if is_cpu else CONTEXT_BYTES,
        }

    def largest_batch(self) -> int:
        """Return how many conversations of a micro-batch fit into the memory, `MOST_BATCH` at most."""
        batch = self.batch()
        steps = (self.memory(batch._replace(size=number + 1)) for number in range(MOST_BATCH))
        return sum(sum(parts.values()) <= self.free_bytes for parts in steps)

    def flops(self, batch: Batch) -> tuple[Number, Number]:
        """Compute the operations of an optimizer step: of the target that reads, and of all else.

        Of experts, those that are not chosen count too.
        """
        drafter, train = self.drafter, self.recipe.train
        matrices = self.matrices(batch)
        slots = batch.size * batch.num_slots
        seen = batch.num_tokens / 2 + drafter.block_size  # by a slot, on average
        work = sum(rows * out * of for rows, out, of in matrices)
        work += 2 * slots * seen * len(drafter.layers) * drafter.config.num_attention_heads * drafter.config.head_dim
        work *= 4 if train.gradient_checkpointing else 3
        scored = slots * (1 - 1 / drafter.block_size) * self.num_rows * self.target.hidden_size
        work += scored * (3 if self.recipe.loss.needs_target_probs else 2)
        last = None if self.recipe.needs_target_hidden else max(drafter.target_layer_ids) + 1
        reading = sum(weight.numel() for weight in self.target.layers[:last].parameters())
        reading *= batch.size * batch.num_tokens
        sizes = [sorted(sizes) for _, *sizes in matrices if train.optimizer == "muon"]
        orthogonalizing = sum(10 * (2 * short**2 * long + short**3) for short, long in sizes)
        twice = 2 * train.gradient_accumulation_steps
        return twice * reading, twice * work + orthogonalizing

    @property
    def seconds(self) -> Number:
        """Estimate the seconds of a whole training, without those in which tau is measured."""
        train = self.recipe.train
        mean = self.batch(np.mean)
        reading, training = self.flops(mean)
        num_read = self.num_steps
        if self.feature_place != "computed in every step":
            num_read = self.lengths.shape[1] / (mean.size * train.gradient_accumulation_steps)
        reader = measure_flops(self.device, self.target.model.dtype, NUM_ROWS)
        trainer = measure_flops(self.device, self.products, NUM_ROWS)
        return num_read * reading / reader + self.num_steps * training / trainer

    def answering_seconds(self, lengths: np.ndarray) -> Number:
        """Estimate the seconds in which the target answers prompts with these `expected_lengths`, at most.

        A token of a prompt takes as long as one of an answer.
        """
        at_once = min(lengths.shape[1], self.recipe.respond.batch_size)
        num_rows = max(at_once, FEWEST_ROWS)
        work = 2 * self.target.model.num_parameters() * lengths[0].sum() * num_rows / at_once
        return work / measure_flops(self.device, self.target.model.dtype, num_rows)

    @property
    def disk_bytes(self) -> int:
        """Bytes of a drafter's folder, at most: three checkpoints, since one is written beside two; and the drafter."""
        num_weights = self.drafter.num_parameters()
        return 12 * (num_weights + self.num_moments) + 2 * num_weights + SMALL_FILES


def plan_recipe(recipe: Recipe, lengths: np.ndarray, *, memory: int | None = None) -> TrainingPlan:
    """Plan a recipe from the target's config alone, on this machine or on one with as much memory.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: a config that transformers does not know, or that its own class refuses; a drafter that cannot work
            with this target; or see `find_target` and `find_device`.
    """
    is_here = memory is None or recipe.device == "cpu" or torch.accelerator.is_available()
    device = find_device(recipe.device) if is_here else torch.device("cuda")
    if memory is None:
        is_cpu = device.type == "cpu"
        memory = psutil.virtual_memory().available if is_cpu else torch.accelerator.get_memory_info(device)[0]
    dtype = getattr(torch, recipe.dtype, default_dtype(device))
    fix = "name the folder or the Hub id of a causal LM"
    with translate_library_errors(f"the config of {recipe.target}", fix), torch.device("meta"):
        config = find_target_files(find_target(recipe.target)).config
        auto: Any = auto_class(config) or AutoModelForCausalLM  # which says what it knows
        target = PaperTarget(auto.from_config(config, dtype=dtype, attn_implementation="eager"))
    with torch.device("meta"):
        drafter = Drafter.from_target(target, **vars(recipe.drafter))
    return TrainingPlan(recipe, device, memory, target, drafter, lengths.clip(1, recipe.train.max_length))
