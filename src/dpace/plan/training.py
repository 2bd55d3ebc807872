"""Plan a training by formula: memory, operations, time and disk, before a weight is loaded.

Models whose tensors have shapes only, and the lengths of the conversations come in; numbers go out. Memory is a sum of
named terms, as if all of them were there at once. Operations are those of products of matrices.
"""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import bytes_of_token
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.head_scores import default_chunk_bytes
from dpace.plan.speed import Machine, Number, find_machine
from dpace.prompts.prompts import Prompt
from dpace.respond.responses import AnswerLengths
from dpace.system.loading import attention_of, translate_library_errors
from dpace.system.ranks import num_ranks
from dpace.target import Target
from dpace.target.files import auto_class, find_target_files
from dpace.target.head import LmHead
from dpace.target.locate import find_target
from dpace.train.checkpoints import checkpoint_folders
from dpace.train.loop import num_steps

START_SECONDS = 15.0
"""Time that a command takes to import libraries, to find its files, and to write what it found."""
FILE_SPEED = 1e9
"""Bytes of files that are assumed to be read in a second."""
CONTEXT_BYTES = 3 * 2**28
"""Bytes that CUDA's context and libraries are assumed to take on a GPU."""
BYTES_PER_TOKEN = 4
"""Bytes of a prompt's messages that a token of them has at least, on average: the names of their parts count too."""
DISTINCT_TOKENS = 10
"""Distinct tokens of a text, divided by the root of its length, as Heaps' law has them."""
KEPT_STATES = 1.5
"""Numbers that the backward pass reads, over those that products read and give: norms and activations keep theirs."""
MATCHED_ROWS = 3
"""Rows of a block that are multiplied with the head where its drafts are compared with a text: about tau."""
FINAL_MEASUREMENTS = 2
"""Measurements of tau after the last step: of the rounded weights, and of the draft vocabulary."""
SMALL_FILES = 2**23
"""Bytes of all files of a drafter's folder but weights, moments and log, at most; the largest is a list of tokens."""
SLOT_BYTES = 128
"""Bytes of a slot in an entry of the log, at most."""


class PaperTarget(Target):
    """A target whose tensors have shapes and no values; that embedding and head are plain tables is not looked at."""

    cache_ability: Any = "crop"
    stop_token_ids: Any = ()

    def _find_tables(self) -> tuple[float, LmHead]:
        return 1.0, LmHead(self.model.get_output_embeddings().weight)


def paper_target(name: str, dtype: torch.dtype) -> Target:
    """Make a target of its config alone.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: a config that transformers does not know, or that its own class refuses; or see `find_target`.
    """
    with translate_library_errors(f"the config of {name}", "name the folder or the Hub id of a causal LM"):
        config = find_target_files(find_target(name)).config
        auto = auto_class(config)
        if auto is None:
            raise ValueError(f"transformers has no causal LM for {type(config).__name__}")
        attention = attention_of(auto._model_mapping[type(config)])
        with torch.device("meta"):
            return PaperTarget(auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention))


def known_lengths(dataset: ResponseDataset) -> np.ndarray:
    """Return tokens and anchors of conversations that are answered, "2 conversation"."""
    anchors = dataset.corpus.num_anchors(dataset.max_length)[dataset.chosen]
    return np.stack([dataset.lengths, anchors]).astype(float)


def expected_lengths(prompts: Sequence[Prompt], recipe: Recipe, kept: Mapping[str, AnswerLengths]) -> np.ndarray:
    """Estimate what `known_lengths` will be: from the prompts' texts, and from the mean answer where there is none."""
    answer = mean_answer(kept, recipe)
    rows = np.ones((2, len(prompts)))
    for number, prompt in enumerate(prompts):
        answered = len(prompt.turns) * answer
        tokens = len(str(prompt.turns).encode()) / BYTES_PER_TOKEN + answered
        if found := kept.get(prompt.id):
            answered = sum(found.answers)
            tokens = found.num_tokens
        rows[:, number] = tokens, answered
    return rows.clip(1, recipe.train.max_length)


def mean_answer(kept: Mapping[str, AnswerLengths], recipe: Recipe) -> Number:
    """Compute the mean length of answers in tokens; without any, it is the longest that the recipe allows."""
    limit = recipe.respond.max_new_tokens
    return min(limit, statistics.mean([length for found in kept.values() for length in found.answers] or [limit]))


@dataclass(frozen=True)
class TargetPlan:
    """What a target takes on a machine; it needs no values."""

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

    @property
    def start_seconds(self) -> Number:
        """Seconds until it is loaded."""
        return START_SECONDS + self.target_bytes / FILE_SPEED

    def reading_seconds(self, num_tokens: Number) -> Number:
        """Estimate the seconds in which texts are read, with all their tokens at once."""
        return 2 * self.target.model.num_parameters() * num_tokens / self.machine.speed.flops

    def decoding_seconds(self, num_answers: int, num_tokens: Number, batch_size: int = 1) -> Number:
        """Estimate the seconds of plain decoding: a step reads all weights, and multiplies them at the same time.

        Args:
            num_answers: answers to write.
            num_tokens: of each answer.
            batch_size: answers that are written at once.
        """
        num_bytes = -(-num_answers // batch_size) * num_tokens * (self.copied_bytes or self.target_bytes)
        return max(num_bytes / self.machine.speed.bytes_per_second, self.reading_seconds(num_answers * num_tokens))


def plan_target(recipe: Recipe) -> TargetPlan:
    """Plan what the target of a recipe takes; see `plan_recipe`."""
    machine = find_machine(recipe)
    return TargetPlan(paper_target(recipe.target, machine.dtype), machine)


def steps_done(folder: Path) -> int:
    """Count the steps of a drafter's newest checkpoint; 0 without one."""
    return max(checkpoint_folders(folder / "checkpoints"), default=0)


class Shape(NamedTuple):
    """A micro-batch, all of whose blocks are full."""

    batch_size: int
    num_tokens: Number
    """Tokens of each conversation."""
    num_blocks: Number
    """Blocks of each conversation."""


@dataclass(frozen=True)
class TrainingPlan(TargetPlan):
    """What a training takes; neither target nor drafter need values."""

    recipe: Recipe
    drafter: Drafter
    trained: np.ndarray
    """Tokens and anchors of the conversations, "2 conversation"."""
    validation: np.ndarray
    """The same of those to validate on."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return num_steps(self.recipe.train, self.trained.shape[1], num_ranks())

    @property
    def num_moments(self) -> int:
        """Numbers that the optimizer keeps: two for each weight, and Muon one; its second ones of vectors are few."""
        return self.drafter.num_parameters() * (1 if self.recipe.train.optimizer == "muon" else 2)

    @property
    def num_rows(self) -> int:
        """Tokens that the softmax covers."""
        num_seen = int(DISTINCT_TOKENS * self.trained[0].sum() ** 0.5)
        num_tokens = len(self.target.head.weight)
        return min(num_tokens, num_seen) if self.recipe.loss.vocabulary == "seen" else num_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's features where a training reads them."""
        num_layers = len(self.drafter.target_layer_ids) + self.recipe.needs_target_hidden
        return bytes_of_token(self.target, num_layers, self.recipe.train.feature_dtype)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of all conversations."""
        return int(self.trained[0].sum() * self.token_bytes)

    @property
    def feature_place(self) -> str:
        """Where the features of all conversations are, see `keep_features`."""
        train = self.recipe.train
        if train.feature_files:
            return "on disk"
        return "kept" if self.feature_bytes <= train.feature_cache_gib * 2**30 else "computed in every step"

    @property
    def read_weights(self) -> int:
        """Weights that a token's features take; experts that are not chosen count too."""
        last = None if self.recipe.needs_target_hidden else max(self.drafter.target_layer_ids) + 1
        return sum(weight.numel() for weight in self.target.layers[:last].parameters())

    def shape(self, summary: Callable[[np.ndarray], Any] = np.max) -> Shape:
        """Return the largest micro-batch, or with `np.mean` the mean one."""
        train, (tokens, anchors) = self.recipe.train, self.trained
        blocks = anchors.clip(max=train.num_anchors)
        return Shape(min(train.batch_size, len(tokens)), float(summary(tokens)), float(summary(blocks)))

    def matrices(self, shape: Shape) -> list[tuple[Number, int, int]]:
        """List the sizes of each matrix of the drafter, behind the rows that a micro-batch multiplies with it."""
        context = shape.batch_size * shape.num_tokens
        slots = shape.batch_size * shape.num_blocks * self.drafter.block_size
        found = []
        for name, weight in self.drafter.named_parameters():
            rows = slots * (self.drafter.selector.num_candidates if name.startswith("lilicorr") else 1)
            if name == "fc.weight":
                rows = context
            elif "k_proj" in name or "v_proj" in name:
                rows = context + slots
            if weight.ndim == 2:
                found.append((rows, *weight.shape))
        return found

    def memory(self, shape: Shape, *, is_checkpointed: bool = False) -> dict[str, int]:
        """Compute the bytes of a step by part.

        Args:
            shape: of the micro-batch.
            is_checkpointed: compute activations again, whatever the recipe says.
        """
        drafter, head, machine = self.drafter, self.target.head.weight, self.machine
        hidden, num_layers, item = self.target.hidden_size, len(drafter.layers), machine.products.itemsize
        slots = shape.batch_size * shape.num_blocks * drafter.block_size
        seen = shape.num_tokens + shape.num_blocks * drafter.block_size
        activations = KEPT_STATES * item * sum(rows * (out + of) for rows, out, of in self.matrices(shape))
        activations += 4 * num_layers * slots * seen if machine.is_cpu else 0  # the mask of attention as numbers
        if is_checkpointed or self.recipe.train.gradient_checkpointing:
            activations = activations / num_layers + 4 * num_layers * slots * hidden
        loss = self.recipe.loss
        chunk = default_chunk_bytes(head, is_cpu=machine.is_cpu, is_soft=loss.needs_target_probs)
        tiles = min(loss.chunk_mib * 2**20 if loss.chunk_mib else chunk, 4 * slots * self.num_rows)
        return {
            "target": self.target_bytes,
            "its copies for speed": self.copied_bytes,
            "drafter": drafter.num_parameters() * (4 if item == 4 else 4 + item),
            "optimizer's moments": 4 * self.num_moments,
            "gradient": 4 * drafter.num_parameters(),
            "hidden states": int(shape.batch_size * shape.num_tokens * self.token_bytes),
            "hidden states that are kept": self.feature_bytes if machine.is_cpu and self.feature_place == "kept" else 0,
            "activations of the drafter": int(activations),
            "loss through the head": int(12 * slots * hidden + 2 * tiles),
            "CUDA's context": 0 if machine.is_cpu else CONTEXT_BYTES,
        }

    def fits(self, shape: Shape, *, is_checkpointed: bool = False) -> bool:
        """Return whether a step fits into the memory."""
        return sum(self.memory(shape, is_checkpointed=is_checkpointed).values()) <= self.machine.memory

    def flops(self, shape: Shape) -> dict[str, Number]:
        """Compute the operations of an optimizer step by part."""
        drafter, train = self.drafter, self.recipe.train
        slots = shape.batch_size * shape.num_blocks * drafter.block_size
        seen = shape.num_tokens + shape.num_blocks * drafter.block_size
        if not self.machine.is_cpu:  # whose kernel leaves out what a slot does not see
            seen = shape.num_tokens / 2 + drafter.block_size
        matrices = self.matrices(shape)
        work = sum(rows * out * of for rows, out, of in matrices)
        config: Any = drafter.config
        work += 2 * slots * seen * len(drafter.layers) * config.num_attention_heads * config.head_dim
        scored = slots * (1 - 1 / drafter.block_size) * self.num_rows * self.target.hidden_size
        sizes = [sorted(sizes) for _, *sizes in matrices if train.optimizer == "muon"]
        twice = 2 * train.gradient_accumulation_steps
        return {
            "target": twice * shape.batch_size * shape.num_tokens * self.read_weights,
            "drafter": twice * work * (4 if train.gradient_checkpointing else 3),
            "head": twice * scored * (3 if self.recipe.loss.needs_target_probs else 2),
            "optimizer": sum(10 * (2 * short**2 * long + short**3) for short, long in sizes),
        }

    def measuring_seconds(self, num_blocks: Number) -> Number:
        """Estimate the seconds in which blocks are drafted and compared with a text, in the target's precision."""
        work = sum(rows * out * of for rows, out, of in self.matrices(Shape(1, 0, 1)))
        work += MATCHED_ROWS * self.target.head.weight.numel()
        return 2 * work * num_blocks / self.machine.speed.flops

    def seconds(self, folders: Sequence[Path]) -> dict[str, Number]:
        """Estimate the seconds that are left of the training of drafters, by kind of work.

        Args:
            folders: of the drafters; a finished one takes no time, and one with a checkpoint goes on after it.
        """
        train, machine = self.recipe.train, self.machine
        unfinished = [folder for folder in folders if not (folder / "provenance.json").exists()]
        left = sum(max(0, self.num_steps - steps_done(folder)) for folder in unfinished)
        mean = self.shape(np.mean)
        work = self.flops(mean)
        read = work.pop("target") / machine.speed.flops
        num_tokens = self.validation[0].sum()
        if self.feature_place != "computed in every step":
            num_tokens += self.trained[0].sum()
            tokens = train.gradient_accumulation_steps * mean.batch_size * mean.num_tokens
            read = tokens * self.token_bytes / FILE_SPEED if train.feature_files else 0
        measured = self.validation[1].sum() * (math.ceil(self.num_steps / train.eval_steps) + FINAL_MEASUREMENTS)
        return {
            "hidden states": 2 * self.read_weights * num_tokens / machine.speed.flops if unfinished else 0,
            "steps": left * (read + sum(work.values()) / machine.training_speed.flops),
            "tau": len(unfinished) * self.measuring_seconds(measured),
        }

    @property
    def disk_bytes(self) -> int:
        """Bytes of a drafter's folder, at most: three checkpoints, since one is written beside two; and the drafter."""
        train = self.recipe.train
        weights = sum(tensor.numel() for tensor in self.drafter.state_dict().values())
        entries = 2 + self.num_steps // train.logging_steps + self.num_steps // train.eval_steps
        log = entries * SLOT_BYTES * (4 + self.drafter.block_size)
        return 12 * (weights + self.num_moments) + 2 * weights + 4 * log + SMALL_FILES


def plan_recipe(
    recipe: Recipe, trained: np.ndarray, validation: np.ndarray, *, memory: int | None = None
) -> TrainingPlan:
    """Plan a training from its recipe, on this machine or on one with as much memory.

    Raises:
        ValueError: see `find_machine` and `paper_target`; or a drafter that cannot work with this target.
    """
    machine = find_machine(recipe, memory=memory)
    target = paper_target(recipe.target, machine.dtype)
    with torch.device("meta"):
        drafter = Drafter.from_target(target, **vars(recipe.drafter))
    return TrainingPlan(target, machine, recipe, drafter, trained, validation)
