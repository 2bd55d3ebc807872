"""Plan a training: conversations, steps, memory, disk and time, before a weight is loaded.

The conversations of a recipe, as far as they are known before its training.

How fast this machine multiplies and reads memory, measured in a moment.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PretrainedConfig

from dpace.batches.corpus import load_corpus
from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import bytes_of_token
from dpace.config import Recipe, TrainConfig
from dpace.drafter import Drafter
from dpace.plan.step import BatchShape, Models, PaperStep, StepPlan, make_drafter, make_target, on_paper
from dpace.prompts.prompts import split_prompts
from dpace.system.device import find_device
from dpace.system.ranks import num_ranks
from dpace.train.run import choose_conversations

ASSUMED_GPU_FLOPS = 3e14
"""Operations a second that are assumed for a GPU that is not at hand: a third of an H100's in bf16."""
MOMENT = 0.1
"""Seconds of one measurement."""


class Speed(NamedTuple):
    """Speed of a machine."""

    flops: float
    """Floating-point operations a second, in products of the training's size."""
    bytes_per_second: float
    """Memory that is read in a second."""


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Time a product and a sum on a device, for a fifth of a second."""
    a = torch.ones(512, 1024, device=device, dtype=dtype)
    b = torch.ones(1024, 1024, device=device, dtype=dtype)
    block = torch.ones(2**24, device=device)
    return Speed(2 * a.numel() * len(b) / _seconds(lambda: a @ b), block.nbytes / _seconds(block.sum))


def _seconds(work) -> float:
    """Time one call: the least of those that fit into a moment, which other programs disturb least."""
    work()
    best, end = float("inf"), time.perf_counter() + MOMENT
    while time.perf_counter() < end:
        start = time.perf_counter()
        float(work().flatten()[0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return best


CONTEXT_BYTES = 3 * 2**28
"""Bytes that CUDA's context and libraries are assumed to take on a GPU."""


class Place(NamedTuple):
    """Where a training runs."""

    is_cuda: bool
    dtype: torch.dtype
    """Dtype of the target's weights."""
    memory: int
    """Bytes that are free for it."""
    is_here: bool = True
    """Whether this machine is that place, so that its speed can be measured."""
    ranks: int = 1

    @property
    def name(self) -> str:
        """The device, for people."""
        return "GPU" if self.is_cuda else "CPU"


class Conversations(NamedTuple):
    """What is known of the conversations that are trained on."""

    number: int | None
    """None where there are no prompts yet."""
    shape: BatchShape
    """Largest micro-batch."""
    mean_tokens: int | float
    mean_blocks: int | float
    validation: int = 0
    validation_mean_tokens: int | float = 0
    is_known: bool = False
    """Whether they are answered; else all lengths are the largest that there may be."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training takes."""

    place: Place
    conversations: Conversations
    step: StepPlan
    paper: PaperStep
    """To look at steps of other shapes."""
    num_steps: int | None
    """Optimizer steps; None where the number of conversations is not known."""
    is_kept: bool
    """Whether the features of all conversations are kept, in memory or on disk, and so computed once."""
    kept_bytes: int
    """Bytes of memory that they take, or would take."""
    stored_bytes: int
    """Bytes of disk that they take."""
    drafter_bytes: int
    """Bytes of the finished drafter's file."""
    disk_bytes: int
    flops_per_second: float
    seconds_per_step: float
    seconds: float | None
    """Seconds of all steps and of reading the features that are kept."""

    @property
    def room(self) -> int:
        """Bytes of memory for tensors: on a GPU without CUDA's context."""
        return self.place.memory - (CONTEXT_BYTES if self.place.is_cuda else 0)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory."""
        return self.step.peak_bytes <= self.room

    @property
    def peak_bytes(self) -> int:
        """Memory that is taken at most, CUDA's context included."""
        return self.step.peak_bytes + self.place.memory - self.room


def find_place(recipe: Recipe, *, memory: int | None = None) -> Place:
    """Find out where a training would run.

    Args:
        recipe: names the device and the dtype.
        memory: bytes to plan for, of a GPU where no device is named; by default what is free on this machine.

    Raises:
        ValueError: see `dpace.system.device.find_device`.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    has_gpu = found is not None
    is_cuda = has_gpu or memory is not None if recipe.device == "auto" else recipe.device != "cpu"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    if recipe.dtype != "auto":
        dtype = getattr(torch, recipe.dtype)
    if memory is None:
        device = find_device(recipe.device)
        is_cpu = device.type == "cpu"
        memory = psutil.virtual_memory().available if is_cpu else torch.accelerator.get_memory_info(device)[0]
    return Place(is_cuda, dtype, memory, has_gpu or not is_cuda, num_ranks())


def known_conversations(dataset: ResponseDataset, validation: ResponseDataset, recipe: Recipe) -> Conversations:
    """Look at the conversations that there are."""
    tokens, longest = dataset.lengths.tolist(), validation.lengths.tolist()
    anchors, checked = (x.corpus.num_anchors(x.max_length)[x.chosen].tolist() for x in (dataset, validation))
    blocks = [min(recipe.train.num_anchors, number) for number in anchors]
    seen = len(dataset.seen_tokens) if recipe.loss.vocabulary == "seen" else None
    size = min(recipe.train.batch_size, len(tokens))
    return Conversations(
        number=len(tokens),
        shape=BatchShape(size, max(tokens), max(blocks), max(longest, default=0), max(checked, default=0), seen),
        mean_tokens=sum(tokens) / len(tokens),
        mean_blocks=sum(blocks) / len(blocks),
        validation=len(longest),
        validation_mean_tokens=sum(longest) / max(1, len(longest)),
        is_known=True,
    )


def unknown_conversations(recipe: Recipe, num_train: int | None, num_validation: int) -> Conversations:
    """Take the longest conversations that the recipe allows."""
    train = recipe.train
    longest = train.max_length
    answered = min(longest, recipe.respond.max_new_tokens)
    blocks = min(train.num_anchors, answered - 1) or 1
    checked = (longest, answered - 1) if num_validation or num_train is None else (0, 0)
    shape = BatchShape(train.batch_size, longest, blocks, *checked)
    return Conversations(num_train, shape, longest, blocks, num_validation, longest)


def num_steps(train: TrainConfig, conversations: int, ranks: int = 1) -> int:
    """Count the optimizer steps as the Trainer does."""
    if train.max_steps > 0:
        return train.max_steps
    batches = math.ceil(math.ceil(conversations / ranks) / train.batch_size)
    return math.ceil(train.num_epochs * max(1, math.ceil(batches / train.gradient_accumulation_steps)))


def plan_training(recipe: Recipe, config: PretrainedConfig, conversations: Conversations, place: Place) -> TrainingPlan:
    """Plan a training from the target's config.

    Raises:
        ValueError: a drafter that cannot work with this target; names the option.
    """
    shape = conversations.shape
    with on_paper() as mode:
        target = make_target(config, place.dtype)
        drafter = make_drafter(target, vars(recipe.drafter))
        (kept, is_kept), stored = _kept_features(recipe, target, conversations), 0
        if recipe.train.feature_files:
            stored, kept, is_kept = _stored_features(recipe, target, conversations), 0, True
        paper = PaperStep(
            Models(target, drafter, recipe, place.is_cuda),
            mode,
            copies_bytes=0 if place.is_cuda else _copies_bytes(target, config),
            kept_bytes=kept if is_kept and not place.is_cuda else 0,
        )
    step = paper.plan(shape)
    known = conversations.number if recipe.train.max_steps < 0 else conversations.number or 1
    steps = None if known is None else num_steps(recipe.train, known, place.ranks)
    speed = ASSUMED_GPU_FLOPS
    if place.is_here:
        speed = measure_speed(find_device(recipe.device), place.dtype).flops
    drafter_share = conversations.mean_blocks / shape.num_blocks
    target_share = conversations.mean_tokens / shape.num_tokens
    per_step = step.flops["drafter"] * drafter_share
    once = step.flops["target"] / shape.batch_size * target_share * (conversations.number or 0)
    if not is_kept:
        per_step, once = per_step + step.flops["target"] * target_share, 0.0
    moments = 1 if recipe.train.optimizer == "muon" else 2
    checkpoint_bytes, drafter_bytes = 4 * (1 + moments) * step.drafter_parameters, 2 * step.drafter_parameters
    return TrainingPlan(
        place=place,
        conversations=conversations,
        step=step,
        paper=paper,
        num_steps=steps,
        is_kept=is_kept,
        kept_bytes=kept,
        stored_bytes=stored,
        drafter_bytes=drafter_bytes,
        disk_bytes=2 * (checkpoint_bytes + drafter_bytes),  # each beside the one that it replaces
        flops_per_second=speed,
        seconds_per_step=per_step / speed,
        seconds=None if steps is None else (per_step * steps + once) / speed,
    )


def _kept_features(recipe: Recipe, target: Any, conversations: Conversations) -> tuple[int, bool]:
    """Give the bytes of all features, and whether `ResponseDataset.keep_features` keeps them."""
    layers = len(Drafter.layer_ids(target, **vars(recipe.drafter)))
    width = target.hidden_size * target.head.weight.element_size()
    tokens = (conversations.number or 0) * conversations.mean_tokens
    size = int(tokens * (layers + recipe.loss.needs_target_probs) * width)
    is_kept = conversations.number is not None and size <= recipe.train.feature_cache_gib * 2**30
    checked = int(conversations.validation * conversations.validation_mean_tokens * layers * width)
    return size + (checked if is_kept else 0), is_kept


def _stored_features(recipe: Recipe, target: Any, conversations: Conversations) -> int:
    """Give the bytes of all features on disk."""
    layers = len(Drafter.layer_ids(target, **vars(recipe.drafter))) + recipe.loss.needs_target_probs
    tokens = (conversations.number or 0) * conversations.mean_tokens
    return int(tokens * bytes_of_token(target, layers, recipe.train.feature_dtype))


def _copies_bytes(target: Any, config: PretrainedConfig) -> int:
    """Give the bytes of copies in a faster layout, which a target has on a CPU."""
    if target.head.weight.dtype != torch.float32:
        return 0
    matrices = sum(parameter.numel() for parameter in target.layers.parameters() if parameter.ndim == 2)
    published = config.get_text_config(decoder=True).dtype
    is_short = str(published).removeprefix("torch.") in ("float16", "bfloat16")
    return matrices * (2 if is_short else 4)


def find_conversations(recipe: Recipe) -> Conversations:
    """Read the answers of a recipe, else count its prompts, else know nothing of them.

    Raises:
        ValueError: prompts or answers that cannot be read.
    """
    if recipe.prompts.path != "demo" and not Path(recipe.prompts.path).exists():
        return unknown_conversations(recipe, None, 0)
    parts = split_prompts(recipe.prompts)
    path = Path(recipe.output) / "responses.jsonl"
    if path.exists():
        answered, validation = load_corpus(path, recipe.prompts)
        if len(answered) == len(parts.train):
            return known_conversations(*choose_conversations(answered, validation, recipe), recipe)
    return unknown_conversations(recipe, len(parts.train), len(parts.validation))
