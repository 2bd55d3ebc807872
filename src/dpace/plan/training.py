"""Plan by formula what answers and a training take, before a weight is loaded: memory, operations, time and disk.

Models whose tensors have shapes only, and the lengths of the conversations come in; numbers go out. Memory is a sum of
named terms, as if all of them were there at once. Operations are those of products of matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import bytes_of_token
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.head_scores import default_chunk_bytes
from dpace.plan.speed import Machine, Number, find_machine
from dpace.prompts.prompts import Prompt
from dpace.system.loading import translate_library_errors
from dpace.system.ranks import num_ranks
from dpace.target import Target
from dpace.target.files import auto_class, find_target_files
from dpace.target.head import LmHead
from dpace.target.locate import find_target
from dpace.train.loop import num_steps
from dpace.train.optimizer import is_factor

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


class PaperTarget(Target):
    """A target whose tensors have shapes and no values; that embedding and head are plain tables is not looked at."""

    cache_ability: Any = "crop"
    stop_token_ids: Any = ()

    def _find_tables(self) -> tuple[float, LmHead]:
        return 1.0, LmHead(self.model.get_output_embeddings().weight)


@dataclass(frozen=True)
class TargetPlan:
    """What the answers of a target take; its tensors need no values."""

    target: Target
    machine: Machine

    @property
    def target_bytes(self) -> int:
        """Bytes of its weights."""
        return self.target.model.get_memory_footprint(return_buffers=False)

    @property
    def copied_bytes(self) -> int:
        """Bytes of its copies in 16 bits, which a CPU reads in the place of weights in fp32."""
        return self.target_bytes // 2 if self.machine.is_cpu and self.target.head.weight.itemsize == 4 else 0

    def answering_seconds(
        self, num_answers: int, num_tokens: Number, *, num_read: Number = 0, at_once: int = 1
    ) -> Number:
        """Estimate the seconds of plain decoding: to read all weights in each step, or to multiply all tokens by them.

        Args:
            num_answers: answers to write.
            num_tokens: of each answer.
            num_read: tokens of all prompts.
            at_once: answers that are written together.
        """
        num_bytes = math.ceil(num_answers / at_once) * num_tokens * (self.copied_bytes or self.target_bytes)
        flops = 2 * self.target.model.num_parameters() * (num_read + num_answers * num_tokens)
        return max(num_bytes / self.machine.speed.bytes_per_second, flops / self.machine.speed.flops)


def plan_target(recipe: Recipe, *, memory: int | None = None) -> TargetPlan:
    """Make the target of a recipe from its config alone, on this machine or on one with as much memory.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: a config that transformers does not know, or that its own class refuses; or see `find_target` and
            `find_machine`.
    """
    machine = find_machine(recipe, memory)
    fix = "name the folder or the Hub id of a causal LM"
    with translate_library_errors(f"the config of {recipe.target}", fix), torch.device("meta"):
        config = find_target_files(find_target(recipe.target)).config
        auto: Any = auto_class(config) or AutoModelForCausalLM  # which says what it knows
        model = auto.from_config(config, dtype=machine.dtype, attn_implementation="eager")
        return TargetPlan(PaperTarget(model), machine)


def known_lengths(dataset: ResponseDataset) -> np.ndarray:
    """Return tokens and anchors of conversations that are answered, "2 conversation"."""
    anchors = [example.num_anchors(dataset.max_length) for example in dataset.examples]
    return np.stack([dataset.lengths, anchors]).astype(float)


def expected_lengths(prompts: Sequence[Prompt], recipe: Recipe) -> np.ndarray:
    """Estimate what `known_lengths` will be, at most: from the prompts' texts, with answers as long as they may be."""
    answered = [len(prompt.turns) * recipe.respond.max_new_tokens for prompt in prompts]
    asked = [num_prompt_tokens(prompt) for prompt in prompts]
    return np.array([np.add(asked, answered), answered]).clip(1, recipe.train.max_length)


def num_prompt_tokens(prompt: Prompt) -> Number:
    """Estimate the tokens of a prompt's turns."""
    return len(str(prompt.turns).encode()) / BYTES_PER_TOKEN


class Batch(NamedTuple):
    """A micro-batch, all of whose blocks are full."""

    size: int
    """Conversations."""
    num_tokens: Number
    """Tokens of each."""
    num_slots: Number
    """Slots of the blocks of each."""


@dataclass(frozen=True)
class TrainingPlan(TargetPlan):
    """What a training takes; neither target nor drafter need values."""

    recipe: Recipe
    drafter: Any
    lengths: np.ndarray
    """Tokens and anchors of the conversations, "2 conversation"."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return num_steps(self.recipe.train, self.lengths.shape[1], num_ranks())

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
        head, loss, is_cpu = self.target.head.weight, self.recipe.loss, self.machine.is_cpu
        num_layers, item = len(self.drafter.layers), self.machine.products.itemsize
        slots = batch.size * batch.num_slots
        states = 4 * slots * self.target.hidden_size
        activations = KEPT_STATES * item * sum(rows * (out + of) for rows, out, of in self.matrices(batch))
        if is_cpu:  # whose attention has its mask as numbers
            activations += 4 * num_layers * slots * (batch.num_tokens + batch.num_slots)
        if self.recipe.train.gradient_checkpointing:
            activations = activations / num_layers + num_layers * states
        chunk = default_chunk_bytes(head, is_cpu=is_cpu, is_soft=loss.needs_target_probs)
        tiles = min(loss.chunk_mib * 2**20 if loss.chunk_mib else chunk, 4 * slots * self.num_rows)
        num_weights = self.drafter.num_parameters()
        return {
            "target": self.target_bytes,
            "its copies for speed": self.copied_bytes,
            "drafter": num_weights * (4 if item == 4 else 4 + item),
            "optimizer's moments": 4 * self.num_moments,
            "gradient": 4 * num_weights,
            "hidden states": batch.size * batch.num_tokens * self.token_bytes,
            "hidden states that are kept": self.feature_bytes if is_cpu and self.feature_place == "kept" else 0,
            "activations of the drafter": activations,
            "loss through the head": 3 * states + 2 * tiles,
            "CUDA's context": 0 if is_cpu else CONTEXT_BYTES,
        }

    def fits(self, batch: Batch) -> bool:
        """Return whether a step fits into the memory."""
        return sum(self.memory(batch).values()) <= self.machine.memory

    def flops(self, batch: Batch) -> dict[str, Number]:
        """Compute the operations of an optimizer step by part; of experts, those that are not chosen count too."""
        drafter, train = self.drafter, self.recipe.train
        seen = batch.num_tokens + batch.num_slots
        if not self.machine.is_cpu:  # whose kernel leaves out what a slot does not see
            seen = batch.num_tokens / 2 + drafter.block_size
        slots = batch.size * batch.num_slots
        matrices = self.matrices(batch)
        work = sum(rows * out * of for rows, out, of in matrices)
        work += 2 * slots * seen * len(drafter.layers) * drafter.config.num_attention_heads * drafter.config.head_dim
        scored = slots * (1 - 1 / drafter.block_size) * self.num_rows * self.target.hidden_size
        last = None if self.recipe.needs_target_hidden else max(drafter.target_layer_ids) + 1
        read_weights = sum(weight.numel() for weight in self.target.layers[:last].parameters())
        sizes = [sorted(sizes) for _, *sizes in matrices if train.optimizer == "muon"]
        twice = 2 * train.gradient_accumulation_steps
        return {
            "target": twice * batch.size * batch.num_tokens * read_weights,
            "drafter": twice * work * (4 if train.gradient_checkpointing else 3),
            "head": twice * scored * (3 if self.recipe.loss.needs_target_probs else 2),
            "optimizer": sum(10 * (2 * short**2 * long + short**3) for short, long in sizes),
        }

    @property
    def seconds(self) -> Number:
        """Estimate the seconds of a whole training, without those in which tau is measured."""
        mean = self.batch(np.mean)
        work = self.flops(mean)
        reading = work.pop("target") / self.machine.speed.flops
        step_size = mean.size * self.recipe.train.gradient_accumulation_steps
        is_kept = self.feature_place != "computed in every step"
        num_read = self.lengths.shape[1] / step_size if is_kept else self.num_steps
        return num_read * reading + self.num_steps * sum(work.values()) / self.machine.training_speed.flops

    @property
    def disk_bytes(self) -> int:
        """Bytes of a drafter's folder, at most: three checkpoints, since one is written beside two; and the drafter."""
        num_weights = self.drafter.num_parameters()
        return 12 * (num_weights + self.num_moments) + 2 * num_weights + SMALL_FILES


def plan_recipe(recipe: Recipe, lengths: np.ndarray, *, memory: int | None = None) -> TrainingPlan:
    """Plan a training from its recipe, on this machine or on one with as much memory.

    Raises:
        OSError: see `plan_target`.
        ValueError: see there; or a drafter that cannot work with this target.
    """
    plan = plan_target(recipe, memory=memory)
    with torch.device("meta"):
        drafter = Drafter.from_target(plan.target, **vars(recipe.drafter))
    return TrainingPlan(plan.target, plan.machine, recipe, drafter, lengths)
