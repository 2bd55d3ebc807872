"""Compute the memory by part, and the operations, of one training step: the real step, run on fake tensors.

The target's config, a recipe and the shape of a micro-batch come in. Models are made of tensors that have shapes and
dtypes and no values; the bytes of those that are alive are added up by the part of the work that made them.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig, PreTrainedModel, initialization

from dpace.config import DrafterConfig, Recipe
from dpace.drafter import Drafter
from dpace.loss import block_loss
from dpace.loss.head_scores import SOFT_COPIES, default_chunk_bytes
from dpace.system.loading import attention_of, translate_library_errors
from dpace.target import Target
from dpace.target.files import auto_class, find_target_files
from dpace.target.head import Head
from dpace.train.loop import Scorer
from dpace.train.optimizer import make_optimizer
from dpace.weights import uniform_weights

TARGET = "target"
DRAFTER = "drafter"
MOMENTS = "optimizer's moments"
FEATURES = "hidden states of the target"
ACTIVATIONS = "activations of the drafter"
HEAD = "loss through the head"
BACKWARD = "gradient and backward pass"
PARTS = (TARGET, DRAFTER, MOMENTS, FEATURES, ACTIVATIONS, HEAD, BACKWARD)
"""The parts of a step's memory, in the order in which they are shown."""


class BatchShape(NamedTuple):
    """The largest micro-batch of a run."""

    batch_size: int
    num_tokens: int
    """Tokens of the longest conversation, to which the others are padded."""
    num_blocks: int
    """Blocks of the conversation that has most of them."""
    num_head_rows: int | None = None
    """Tokens that the softmax covers; None for the whole vocabulary."""


class StepCost(NamedTuple):
    """What a step takes."""

    parts: dict[str, int]
    """Bytes that are alive at the peak, by part."""
    flops: dict[str, float]
    """Floating-point operations of an optimizer step, by what does them."""

    @property
    def peak_bytes(self) -> int:
        """Peak of the step. Scoring a validation response takes no gradient, few blocks at a time, and so less."""
        return sum(self.parts.values())


aten = torch.ops.aten


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that operations allocate inside its `with` block, and their floating-point operations.

    A view counts once. What an operation allocates and frees inside itself is not seen.

    On fake tensors, which have no values, it also answers what depends on values: every row is chosen (at most
    `max_rows` of them), and a number that is read is 1.

    Args:
        max_rows: largest number of rows that `nonzero` gives for fake tensors.
    """

    def __init__(self, max_rows: int):
        super().__init__()
        self.max_rows = max_rows
        self.live: dict[str, int] = dict.fromkeys(PARTS, 0)
        """Bytes that are alive now, by part."""
        self.at_peak: dict[str, int] = {}
        """Bytes that were alive when most were."""
        self.peak_bytes = 0
        self.flops: Counter[str] = Counter()
        """Operations, by part."""
        self.part = FEATURES
        """The part of the work that allocates now."""
        self._storages: set[int] = set()

    def count(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._add(tensor, part)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and count what it allocated."""
        if function is aten.nonzero.default:
            rows = min(self.max_rows, args[0].numel())
            return args[0].new_empty((rows, args[0].dim()), dtype=torch.long)
        if function is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if count_flops := flop_registry.get(function.overloadpacket):
            self.flops[self.part] += count_flops(*args, **kwargs, out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value, self.part)
        live_bytes = sum(self.live.values())
        if live_bytes > self.peak_bytes:
            self.at_peak = dict(self.live)
            self.peak_bytes = live_bytes
        return out

    def _add(self, tensor, part):  # called at every operation, so without the types that tests check
        """Count the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages and (size := storage.nbytes()):
            self._storages.add(key)
            self.live[part] += size
            weakref.finalize(storage, self._remove, key, size, part)

    def _remove(self, key, size, part):
        """Take off a storage."""
        self._storages.remove(key)
        self.live[part] -= size


class PaperTarget(Target):
    """A target of fake tensors: it has shapes and dtypes, and computes nothing.

    Whether embedding and head are plain tables is not looked at, since that takes weights.

    Args:
        model: made of fake tensors.
        mode: that made them; all that meets them is made in it too.
    """

    cache_ability: Any = "crop"

    def __init__(self, model: PreTrainedModel, mode: FakeTensorMode):
        super().__init__(model)
        self.mode = mode

    def _find_tables(self) -> tuple[float, Head]:
        weight = self.model.get_output_embeddings().weight
        return 1.0, Head(weight, 1.0, getattr(self.config, "final_logit_softcapping", None))

    def features(self, token_ids: Tensor, target_layer_ids: Sequence[int], *, with_head_input: bool = False) -> Tensor:
        """Make features of the right shape."""
        width = (len(target_layer_ids) + with_head_input) * self.hidden_size
        return self.head.weight.new_empty(*token_ids.shape, width)


def read_shape(name: str) -> PretrainedConfig:
    """Read the config of a target; nothing else of it is needed.

    Raises:
        OSError: there is no readable config of that name.
        ValueError: a config that transformers does not know.
    """
    with translate_library_errors(f"the config of {name}", "name the folder or the Hub id of a causal LM"):
        config = find_target_files(name).config
        if auto_class(config) is None:
            raise ValueError(f"transformers has no causal LM for {type(config).__name__}")
        return config


def make_target(config: PretrainedConfig, dtype: torch.dtype) -> PaperTarget:
    """Make a target on paper.

    Raises:
        ValueError: a config that its own class refuses.
    """
    auto = auto_class(config)
    attention = attention_of(auto._model_mapping[type(config)])
    fake = FakeTensorMode()
    way = "name another target"
    with translate_library_errors(f"a model of {type(config).__name__}", way), fake, initialization.no_init_weights():
        model = auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
        model.tie_weights()
        return PaperTarget(model, fake)


def make_drafter(target: Target, config: DrafterConfig) -> Drafter:
    """Make an untrained drafter of a recipe that `start_from` has settled."""
    return Drafter.from_target(target, **vars(config)).requires_grad_(True).train()


class PaperStep:
    """Takes training steps on fake tensors, of any shape, and computes what they take.

    On a GPU, attention keeps no scores, which is what flex_attention does, and the drafter computes in bf16, as
    autocast lets it.
    """

    def __init__(self, target: PaperTarget, recipe: Recipe, *, is_cuda: bool):
        self.target = target
        self.recipe = recipe
        self.is_cuda = is_cuda
        with target.mode:
            self.drafter = make_drafter(target, recipe.drafter)
            self.optimizer = make_optimizer(self.drafter, recipe.train)
        self.more_bytes: dict[str, int] = {}
        """Bytes beside those of the step, by part: copies of weights, and features that are kept."""

    def take(self, shape: BatchShape, *, checkpointing: bool = False) -> StepCost:
        """Take a step of a micro-batch of this shape; the first one has no moments yet at its peak.

        Args:
            shape: of the micro-batch, in which every block is full.
            checkpointing: compute activations again, whatever the recipe says.
        """
        target, drafter = self.target, self.drafter
        loss, train = self.recipe.loss, self.recipe.train
        is_soft = loss.needs_target_probs
        if checkpointing or train.gradient_checkpointing:
            drafter.activation_checkpointing_enable()
        with target.mode:
            head = target.head
            if shape.num_head_rows is not None:
                head = head._replace(weight=head.weight.new_empty(shape.num_head_rows, head.weight.shape[1]))
            # One chunk of the loss is run, or three tiles of one, whose work all others repeat.
            default = default_chunk_bytes(head.weight, is_cpu=not self.is_cuda, is_soft=is_soft)
            chunk_bytes = loss.chunk_mib * 2**20 if loss.chunk_mib else default
            num_logits = chunk_bytes // 4
            num_scored = shape.batch_size * shape.num_blocks * (drafter.block_size - 1)
            num_rows = num_logits // SOFT_COPIES // len(head.weight) if is_soft else isqrt(num_logits)
            num_rows = max(1, min(num_rows, num_scored))
            tile = head if is_soft else head._replace(weight=head.weight[: 3 * max(1, num_logits // num_rows)])
            tracker = MemoryTracker(num_rows)
            tracker.live |= self.more_bytes
            tracker.count([*target.model.parameters(), *target.model.buffers()], TARGET)
            tracker.count([*drafter.parameters(), *drafter.buffers()], DRAFTER)
            tracker.count([head.weight], HEAD)
            moments = tree_leaves(list(self.optimizer.state.values()))
            tracker.count((value for value in moments if isinstance(value, Tensor)), MOMENTS)
            masks: dict[str, Any] = {"make_mask": lambda *_: None} if self.is_cuda else {}  # a GPU's is small
            scorer = Scorer(
                drafter,
                target,
                loss,
                lambda slots: uniform_weights(slots.is_scored),
                tile,
                chunk_bytes=chunk_bytes,
                needs_target_hidden=self.recipe.needs_target_hidden,
                autocast=self._autocast,
                **masks,
            )
            with tracker:
                self._run(scorer, self._inputs(shape), tracker)
        drafter.activation_checkpointing_disable()
        optimizer_flops = tracker.flops.pop(MOMENTS, 0)
        # The other chunks: forward and backward, and the target's own logits for soft labels.
        left_out = head.weight.numel() * num_scored - tile.weight.numel() * num_rows
        drafter_flops = tracker.flops.total() + (6 if is_soft else 4) * left_out + self._attention_flops(shape)
        flops = {
            "target": float(train.gradient_accumulation_steps * self._target_flops(shape)),
            "drafter": float(train.gradient_accumulation_steps * drafter_flops),
            "optimizer": float(optimizer_flops),
        }
        return StepCost({part: size for part, size in tracker.at_peak.items() if size >= 1024}, flops)

    def _inputs(self, shape: BatchShape) -> dict[str, Tensor]:
        """Make a micro-batch with its features."""
        anchors = torch.zeros(shape.batch_size, shape.num_blocks, dtype=torch.long)
        labels = torch.zeros(*anchors.shape, self.drafter.block_size, dtype=torch.long)
        token_ids = torch.zeros(shape.batch_size, shape.num_tokens, dtype=torch.long)
        with_last = self.recipe.needs_target_hidden
        return {
            "token_ids": token_ids,
            "features": self.target.features(token_ids, self.drafter.target_layer_ids, with_head_input=with_last),
            "is_response": torch.ones_like(token_ids, dtype=torch.bool),
            "anchors": anchors,
            "whole_blocks": torch.arange(anchors.numel()),
            "labels": labels,
            "is_scored": torch.ones_like(labels, dtype=torch.bool),
            "is_block": torch.ones_like(anchors, dtype=torch.bool),
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_cuda)

    def _run(self, scorer: Scorer, inputs: dict[str, Tensor], tracker: MemoryTracker) -> None:
        """Compute the loss of a micro-batch and its gradient, and take a step, as training does."""

        def draft(**batch: Any) -> Any:  # as `accelerate` does: in bf16 on a GPU, with a result in fp32
            with self._autocast():
                out = self.drafter(**batch)
            out.last_hidden_state = out.last_hidden_state.float()
            tracker.part = HEAD
            return out

        tracker.part = ACTIVATIONS
        out, blocks = scorer.score(draft, inputs)
        loss = block_loss(out.losses, blocks.is_scored, num_items=1)
        inputs.clear()
        del out
        tracker.part = BACKWARD
        loss.backward()
        tracker.part = MOMENTS
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.recipe.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _attention_flops(self, shape: BatchShape) -> float:
        """Count the operations of the drafter's attention: one forward pass, and 2.5 times as much backward."""
        queries = shape.num_blocks * self.drafter.block_size
        seen = shape.num_tokens + queries
        config = self.drafter.config
        layers: Any = self.drafter.layers
        windows = [layer.self_attn.window for layer in layers]
        seen = len(windows) * seen
        if self.is_cuda:
            seen = sum(min(shape.num_tokens / 2, window) + self.drafter.block_size for window in windows)
        width = config.num_attention_heads * config.head_dim
        return 3.5 * 4 * shape.batch_size * width * queries * seen

    def _target_flops(self, shape: BatchShape) -> float:
        """Count the operations in which the target computes features: each weight counts, those of experts too."""
        target = self.target
        last = None if self.recipe.needs_target_hidden else max(self.drafter.target_layer_ids) + 1
        weights = sum(parameter.numel() for parameter in target.layers[:last].parameters())
        width = target.config.num_hidden_layers * self.drafter.config.num_attention_heads
        scores = width * self.drafter.config.head_dim * shape.num_tokens
        return 2.0 * shape.batch_size * shape.num_tokens * (weights + scores)
