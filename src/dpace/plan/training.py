"""Plan a training before a weight is loaded: its conversations, steps, memory, disk and time.

A recipe, the target's config, and what is known of the prompts and answers come in; a `TrainingPlan` goes out.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from transformers import PretrainedConfig

from dpace.batches.corpus import load_corpus
from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import bytes_of_token
from dpace.config import Recipe
from dpace.plan.speed import ASSUMED_GPU, Number, Speed, TargetSpeed, measure_speed
from dpace.plan.step import (
    FEATURES,
    TARGET,
    BatchShape,
    PaperStep,
    PaperTarget,
    StepCost,
    make_target,
    read_shape,
)
from dpace.prompts.prompts import Prompt, PromptParts
from dpace.respond.responses import Response
from dpace.system.device import find_device
from dpace.system.ranks import num_ranks
from dpace.target.locate import find_target
from dpace.train.checkpoints import checkpoint_folders
from dpace.train.loop import num_steps
from dpace.train.run import choose_conversations

CONTEXT_BYTES = 3 * 2**28
"""Bytes that CUDA's context and libraries are assumed to take on a GPU."""
BYTES_PER_TOKEN = 3
"""Bytes of a prompt's text that a token has at least, on average; more in English."""
TOKENS_PER_MESSAGE = 5
"""Tokens that a chat template adds to a message."""
DISTINCT_TOKENS = 10
"""Distinct tokens of a text, divided by the root of its length, as Heaps' law has them."""
FeaturePlace = Literal["kept", "on disk", "computed in every step"]
"""Where the target's features are: in memory, in files, or nowhere."""
MATCHED_ROWS = 3
"""Rows of a block that are multiplied with the head where its drafts are compared with a text: about tau."""
FINAL_MEASUREMENTS = 3
"""Measurements of tau after the last step: of the rounded weights, of the draft vocabulary, and of confidences."""


class Machine(NamedTuple):
    """Where a training runs."""

    is_cuda: bool
    dtype: torch.dtype
    """Dtype of the target's weights."""
    memory: int
    """Bytes that are free for it."""
    is_here: bool = True
    """Whether it is this machine, so that its speed can be measured."""
    ranks: int = 1

    @property
    def speed(self) -> Speed:
        """Its speed, measured, or assumed where it is not at hand."""
        if not self.is_here:
            return ASSUMED_GPU
        return measure_speed(find_device("auto" if self.is_cuda else "cpu"), self.dtype)


def find_machine(recipe: Recipe, *, memory: int | None = None) -> Machine:
    """Find out where a training would run.

    Args:
        recipe: names the device and the dtype.
        memory: bytes to plan for, of a GPU where no device is named; by default what is free on this machine.

    Raises:
        ValueError: see `dpace.system.device.find_device`.
    """
    has_gpu = torch.accelerator.is_available()
    is_cuda = has_gpu or memory is not None if recipe.device == "auto" else recipe.device != "cpu"
    dtype = getattr(torch, recipe.dtype, torch.bfloat16 if is_cuda else torch.float32)  # the latter for auto
    if memory is None:
        device = find_device(recipe.device)
        memory = (
            psutil.virtual_memory().available if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]
        )
    return Machine(is_cuda, dtype, memory, has_gpu or not is_cuda, num_ranks())


class Conversations(NamedTuple):
    """What is known of the conversations that are trained on."""

    number: int | None
    """None where there are no prompts yet."""
    shape: BatchShape
    """Largest micro-batch."""
    mean_tokens: Number
    mean_blocks: Number
    validation_tokens: Number
    """Tokens of all validation conversations."""
    validation_blocks: Number
    """Their blocks: every token of a response is an anchor there."""
    is_known: bool = False
    """Whether they are answered; else the answers' lengths are expected ones."""


def _describe(recipe: Recipe, trained: np.ndarray, checked: np.ndarray) -> Conversations:
    """Describe conversations by the tokens and anchors of each, "2 conversation": to train on, and to choose by."""
    tokens, anchors = trained
    blocks = anchors.clip(1, recipe.train.num_anchors)
    return Conversations(
        number=len(tokens),
        shape=BatchShape(min(recipe.train.batch_size, len(tokens)), int(tokens.max()), int(blocks.max())),
        mean_tokens=float(tokens.mean()),
        mean_blocks=float(blocks.mean()),
        validation_tokens=float(checked[0].sum()),
        validation_blocks=float(checked[1].sum()),
    )


def known_conversations(dataset: ResponseDataset, validation: ResponseDataset, recipe: Recipe) -> Conversations:
    """Take the lengths of conversations that are answered."""
    parts = (dataset, validation)
    lengths = [np.stack([part.lengths, part.corpus.num_anchors(part.max_length)[part.chosen]]) for part in parts]
    known = _describe(recipe, *lengths)
    rows = len(dataset.seen_tokens) if recipe.loss.vocabulary == "seen" else None
    return known._replace(shape=known.shape._replace(num_head_rows=rows), is_known=True)


def expected_lengths(prompts: Sequence[Prompt], recipe: Recipe, answer_tokens: Number) -> np.ndarray:
    """Estimate the tokens of each conversation, and the anchors in its answers, from the prompts' texts.

    Returns:
        Both, "2 prompt".
    """
    asked = [
        sum(
            len(message["content"].encode()) / BYTES_PER_TOKEN + TOKENS_PER_MESSAGE
            for turn in prompt.turns
            for message in turn
        )
        for prompt in prompts
    ]
    answers = np.array([len(prompt.turns) for prompt in prompts])
    tokens = np.minimum(np.array(asked) + answers * answer_tokens, recipe.train.max_length)
    return np.stack([tokens, np.minimum(answers * answer_tokens, tokens) - answers])


def expected_conversations(recipe: Recipe, parts: PromptParts | None, answer_tokens: Number) -> Conversations:
    """Estimate the conversations that prompts will become; without prompts, the longest ones that are allowed.

    The largest micro-batch has answers of the longest length, whatever is expected on average.
    """
    limit = recipe.respond.max_new_tokens
    if parts is None:
        tokens = np.full(recipe.train.batch_size, recipe.train.max_length)
        longest = np.stack([tokens, tokens.clip(max=limit) - 1])
        return _describe(recipe, longest, longest[:, :0])._replace(number=None)
    expected, checked = (expected_lengths(part, recipe, answer_tokens) for part in (parts.train, parts.validation))
    longest = _describe(recipe, expected_lengths(parts.train, recipe, limit), checked)
    return _describe(recipe, expected, checked)._replace(shape=longest.shape)


def find_conversations(recipe: Recipe, parts: PromptParts | None, kept: Mapping[str, Response]) -> Conversations:
    """Take the answers of a recipe, else expect as many as it has prompts, else know nothing of them.

    Raises:
        ValueError: answers that cannot be read.
    """
    if parts and kept and all(prompt.id in kept for prompt in parts.train):
        answered, validation = load_corpus(Path(recipe.output) / "responses.jsonl", recipe.prompts)
        return known_conversations(*choose_conversations(answered, validation, recipe), recipe)
    return expected_conversations(recipe, parts, mean_answer(kept.values(), recipe.respond.max_new_tokens))


def mean_answer(responses: Iterable[Response], limit: int, batch_size: int = 1) -> Number:
    """Compute the mean length in tokens of the longest answer of each batch; `limit` without answers.

    Args:
        responses: in the order in which they were answered.
        limit: the longest answer.
        batch_size: answered at once; a batch takes the time of its longest answer.
    """
    lengths = [end - start for response in responses for start, end in response.response_spans]
    longest = [max(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size)]
    return min(limit, statistics.mean(longest or [limit]))


def steps_done(folder: Path) -> int:
    """Count the steps of a drafter's newest checkpoint; 0 without one."""
    return max(checkpoint_folders(folder / "checkpoints"), default=0)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training takes."""

    machine: Machine
    target: TargetSpeed
    conversations: Conversations
    step: StepCost
    """Cost of the largest step."""
    paper: PaperStep
    """To look at steps of other shapes."""
    num_steps: int | None
    """Optimizer steps; None where the number of conversations is not known."""
    features: FeaturePlace
    feature_bytes: int
    """Bytes that the features of all conversations take there, or would take."""
    drafter_parameters: int
    disk_bytes: int
    """Bytes of disk of a drafter and its checkpoints, each beside the one that it replaces."""
    flops: dict[str, Number]
    """Operations of `features` (those that are computed once for all drafters), of a mean `step`, of all measurements
    of `tau` during a training, and of drafting a `block` and comparing it."""

    @property
    def room(self) -> int:
        """Bytes of memory for tensors: on a GPU without CUDA's context."""
        return self.machine.memory - (CONTEXT_BYTES if self.machine.is_cuda else 0)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory."""
        return self.step.peak_bytes <= self.room

    def seconds(self, folders: Sequence[Path]) -> dict[str, Number]:
        """Estimate the seconds that are left of the training of drafters, by kind of work.

        Args:
            folders: of the drafters; a finished one takes no time, and one with a checkpoint goes on after it.
        """
        unfinished = [folder for folder in folders if not (folder / "provenance.json").exists()]
        steps = sum(max(0, (self.num_steps or 0) - steps_done(folder)) for folder in unfinished)
        # On a CPU the drafter computes in fp32, whatever the target's dtype.
        machine = self.machine if self.machine.is_cuda else self.machine._replace(dtype=torch.float32)
        return {
            "hidden states": self.target.seconds_of(bool(unfinished) * self.flops["features"]),
            "steps": steps * self.flops["step"] / machine.speed.flops,
            "tau": len(unfinished) * self.flops["tau"] / machine.speed.flops,
        }


def plan_training(
    recipe: Recipe, config: PretrainedConfig, *, conversations: Conversations, machine: Machine
) -> TrainingPlan:
    """Plan a training from the target's config.

    Raises:
        ValueError: a drafter that cannot work with this target; names the option.
    """
    train = recipe.train
    shape = conversations.shape
    number = conversations.number or 0
    target = make_target(config, machine.dtype)
    paper = PaperStep(target, recipe, is_cuda=machine.is_cuda)
    features, feature_bytes = _plan_features(paper, conversations)
    if not machine.is_cuda:
        paper.more_bytes[TARGET] = _copies_bytes(target, config)
        paper.more_bytes[FEATURES] = feature_bytes if features == "kept" else 0
    drafter = paper.drafter
    parameters = drafter.num_parameters()
    read = parameters
    matched_rows = MATCHED_ROWS
    if drafter.lilicorr is not None:  # its walk takes all rows, and reads each candidate of a slot
        matched_rows = drafter.block_size
        read += (drafter.num_candidates - 1) * sum(weight.numel() for weight in drafter.lilicorr.parameters())
    block_flops = 2.0 * (drafter.block_size * read + matched_rows * target.head.weight.numel())
    mean_tokens = max(1, round(conversations.mean_tokens))
    mean_blocks = max(1, round(conversations.mean_blocks))
    rows = shape.num_head_rows
    if recipe.loss.vocabulary == "seen" and rows is None:
        num_seen = DISTINCT_TOKENS * (number * mean_tokens) ** 0.5
        rows = max(1, min(len(target.head.weight), int(num_seen)))
    mean_flops = paper.take(BatchShape(shape.batch_size, mean_tokens, mean_blocks, rows)).flops
    steps = num_steps(train, number, machine.ranks)
    read_tokens = conversations.validation_tokens
    target_flops = mean_flops["target"]
    if features != "computed in every step":
        read_tokens += number * conversations.mean_tokens
        mean_flops["target"] = 0.0
    tokens_of_step = train.gradient_accumulation_steps * shape.batch_size * mean_tokens
    measurements = math.ceil(steps / train.eval_steps) + FINAL_MEASUREMENTS
    moments = 1 if train.optimizer == "muon" else 2
    return TrainingPlan(
        machine=machine,
        target=target_speed(target, machine),
        conversations=conversations,
        step=paper.take(shape),
        paper=paper,
        num_steps=steps if number or train.max_steps > 0 else None,
        features=features,
        feature_bytes=feature_bytes,
        drafter_parameters=parameters,
        disk_bytes=3 * (4 * (1 + moments) + 2) * parameters,
        flops={
            "features": target_flops * read_tokens / tokens_of_step,
            "step": sum(mean_flops.values()),
            "tau": measurements * conversations.validation_blocks * block_flops,
            "block": block_flops,
        },
    )


def plan_recipe(recipe: Recipe, conversations: Conversations, *, memory: int | None = None) -> TrainingPlan:
    """Plan a training from its recipe, on this machine or on one with as much memory.

    Raises:
        ValueError: see `find_machine` and `plan_training`; or there is no such target.
    """
    config = read_shape(find_target(recipe.target))
    return plan_training(recipe, config, conversations=conversations, machine=find_machine(recipe, memory=memory))


def find_speed(recipe: Recipe) -> TargetSpeed:
    """Find out how fast a recipe's target is here, from its config."""
    machine = find_machine(recipe)
    return target_speed(make_target(read_shape(find_target(recipe.target)), machine.dtype), machine)


def target_speed(target: PaperTarget, machine: Machine) -> TargetSpeed:
    """Add up the weights of a target on paper."""
    num_bytes = target.model.get_memory_footprint(return_buffers=False)
    return TargetSpeed(machine.speed, target.model.num_parameters(), num_bytes)


def _plan_features(paper: PaperStep, conversations: Conversations) -> tuple[FeaturePlace, int]:
    """Return where `keep_features` keeps the features of all conversations, and their bytes there."""
    train, target = paper.recipe.train, paper.target
    layers = len(paper.drafter.target_layer_ids)
    trained_layers = layers + paper.recipe.needs_target_hidden
    tokens = (conversations.number or 0) * conversations.mean_tokens
    if train.feature_files:
        return "on disk", int(tokens * bytes_of_token(target, trained_layers, train.feature_dtype))
    size = tokens * bytes_of_token(target, trained_layers, "target")
    if conversations.number is None or size > train.feature_cache_gib * 2**30:
        return "computed in every step", int(size)
    return "kept", int(size + conversations.validation_tokens * bytes_of_token(target, layers, "target"))


def _copies_bytes(target: Any, config: PretrainedConfig) -> int:
    """Compute the bytes of copies in a faster layout, which a target has on a CPU."""
    if target.head.weight.dtype != torch.float32:
        return 0
    matrices = sum(parameter.numel() for parameter in target.layers.parameters() if parameter.ndim == 2)
    published = str(config.get_text_config(decoder=True).dtype)
    return matrices * (2 if published.endswith("float16") else 4)
