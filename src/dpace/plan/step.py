"""Compute the memory by part, and the operations, of one training step: the real step, run on fake tensors.

The target's config, a recipe and the shape of a micro-batch come in. Models are made of tensors that have shapes and
dtypes and no values; the bytes of those that are alive are added up by the part of the work that made them.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)

from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss import Slots, block_loss
from dpace.loss.head_scores import SOFT_COPIES, default_chunk_bytes
from dpace.system.loading import attention_of, translate_library_errors
from dpace.target import Target
from dpace.target.files import find_target_files
from dpace.target.head import Head
from dpace.target.probe import find_layers
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


class Models(NamedTuple):
    """The models of a plan; fake, or real where a step is measured."""

    target: Any
    drafter: Drafter
    recipe: Recipe
    is_cuda: bool

    def optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer that training makes."""
        return make_optimizer(self.drafter, self.recipe.train)

    def inputs(self, shape: BatchShape) -> dict[str, Any]:
        """Make a micro-batch in which every block is full, with its features."""
        target = self.target
        labels_shape = shape.batch_size, shape.num_blocks, self.drafter.block_size
        labels = torch.zeros(labels_shape, dtype=torch.long, device=target.device)
        places = torch.linspace(0, shape.num_tokens - 1, shape.num_blocks, device=target.device)
        anchors = places.long().expand(shape.batch_size, -1)
        is_scored = torch.ones_like(labels, dtype=torch.bool)
        is_scored[..., 0] = False
        token_ids = torch.zeros(shape.batch_size, shape.num_tokens, dtype=torch.long, device=target.device)
        needs_last = self.recipe.loss.needs_target_probs
        return {
            "token_ids": token_ids,
            "features": target.features(token_ids, self.drafter.target_layer_ids, with_head_input=needs_last),
            "is_response": torch.ones_like(token_ids, dtype=torch.bool),
            "anchors": anchors,
            "labels": labels,
            "is_scored": is_scored,
            "is_block": torch.ones_like(anchors, dtype=torch.bool),
        }

    def backward(
        self,
        inputs: dict[str, Any],
        head: Head,
        *,
        part: Callable[[str], AbstractContextManager] = nullcontext,
        **options: Any,
    ) -> None:
        """Compute the loss of a micro-batch and its gradient, as training does; `inputs` is emptied in between.

        Args:
            inputs: of `inputs`.
            head: the target's, or some of its rows.
            part: makes what is entered for each part of the work.
            options: further fields of `Scorer`.
        """

        def draft(**batch: Any) -> Any:  # as `accelerate` does: in bf16 on a GPU, with a result in fp32
            with part(ACTIVATIONS):
                with torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.is_cuda):
                    out = self.drafter(**batch)
                out.last_hidden_state = out.last_hidden_state.float()
            return out

        def weigh(slots: Slots) -> Tensor:
            return uniform_weights(slots.is_scored)

        scorer = Scorer(self.drafter, self.target, self.recipe.loss, weigh, head, **options)
        with part(HEAD):
            out, blocks = scorer.score(draft, inputs)
            loss = block_loss(out.losses, blocks.is_scored, num_items=1)
        inputs.clear()
        del out
        with part(BACKWARD):
            loss.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient and take an optimizer step."""
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


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
        self._part = BACKWARD
        self._owners: dict[int, tuple[Any, int, str]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the part of the work that allocates inside the `with` block."""
        before = self._part
        self._part = name
        try:
            yield
        finally:
            self._part = before

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
            self.flops[self._part] += count_flops(*args, **kwargs, out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value, self._part)
        live_bytes = sum(self.live.values())
        if live_bytes > self.peak_bytes:
            self.at_peak = dict(self.live)
            self.peak_bytes = live_bytes
        return out

    def _add(self, tensor, part):  # called at every operation, so without the types that tests check
        """Count the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._owners and (size := storage.nbytes()):
            self._owners[key] = weakref.ref(storage, lambda _: self._remove(key)), size, part
            self.live[part] += size

    def _remove(self, key):
        """Take off a storage."""
        _, size, part = self._owners.pop(key)
        self.live[part] -= size


class PaperTarget(Target):
    """A target of fake tensors: it has shapes and dtypes, and computes nothing.

    Whether embedding and head are plain tables is not looked at, since that takes weights.
    """

    cache_ability: Any = "crop"

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer: Any = None
        self.thinking = False
        self.config = model.config.get_text_config(decoder=True)
        self.decoder: Any = model.get_decoder()
        self.layers = find_layers(self.model, self.decoder, self.config)
        weight = self.model.get_output_embeddings().weight
        self.embed_scale = 1.0
        self.head = Head(weight, 1.0, getattr(self.config, "final_logit_softcapping", None))

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
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"transformers has no causal LM for {type(config).__name__}")
        return config


@contextmanager
def on_paper(mode: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Let all tensors made inside the `with` block be fake: shapes without values or memory.

    Args:
        mode: that an earlier block yielded, to go on with its tensors.
    """
    with mode or FakeTensorMode() as entered, initialization.no_init_weights():
        yield entered


def make_target(config: PretrainedConfig, dtype: torch.dtype) -> PaperTarget:
    """Make a target on paper; call it inside `on_paper`.

    Raises:
        ValueError: a config that its own class refuses.
    """
    attention = attention_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    with translate_library_errors(f"a model of {type(config).__name__}", "name another target"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
        model.tie_weights()
    return PaperTarget(model)


def make_drafter(target: Target, options: dict[str, Any]) -> Drafter:
    """Make an untrained drafter, for a target on paper inside `on_paper`.

    Args:
        target: its target.
        options: those of `DrafterConfig`; the weights to start from change nothing here.
    """
    shape = {name: value for name, value in options.items() if name != "init"}
    return Drafter.from_target(target, seed=0, **shape).requires_grad_(True).train()


class PaperStep:
    """Takes training steps on fake tensors, of any shape, and computes what they take.

    On a GPU, attention keeps no scores, which is what flex_attention does, and the drafter computes in bf16, as
    autocast lets it.

    Args:
        models: made inside `dpace.plan.step.on_paper`.
        mode: what that yielded.
        copies_bytes: copies of the target's weights, which a fast layout needs on a CPU.
        kept_bytes: features of all conversations, where they are kept in the same memory.
    """

    def __init__(self, models: Models, mode: FakeTensorMode, *, copies_bytes: int = 0, kept_bytes: int = 0):
        self.models = models
        self.mode = mode
        self.more_bytes = {TARGET: copies_bytes, FEATURES: kept_bytes}
        self.optimizer = models.optimizer()

    def take(self, shape: BatchShape, *, checkpointing: bool | None = None) -> StepCost:
        """Take a step of a micro-batch of this shape; the first one has no moments yet at its peak."""
        models = self.models
        loss = models.recipe.loss
        is_soft = loss.needs_target_probs
        if models.recipe.train.gradient_checkpointing if checkpointing is None else checkpointing:
            models.drafter.activation_checkpointing_enable()
        with on_paper(self.mode):
            head: Head = models.target.head
            if shape.num_head_rows is not None:
                head = head._replace(weight=head.weight.new_empty(shape.num_head_rows, head.weight.shape[1]))
            # One chunk of the loss is run, or three tiles of one, whose work all others repeat.
            chunk_bytes = (loss.chunk_mib or 0) * 2**20
            chunk_bytes = chunk_bytes or default_chunk_bytes(head.weight, is_cpu=not models.is_cuda, is_soft=is_soft)
            num_logits = chunk_bytes // 4
            num_scored = shape.batch_size * shape.num_blocks * (models.drafter.block_size - 1)
            num_rows = num_logits // SOFT_COPIES // len(head.weight) if is_soft else isqrt(num_logits)
            num_rows = max(1, min(num_rows, num_scored))
            tile = head if is_soft else head._replace(weight=head.weight[: 3 * max(1, num_logits // num_rows)])
            tracker = MemoryTracker(num_rows)
            tracker.count([*models.target.model.parameters(), *models.target.model.buffers()], TARGET)
            tracker.count([*models.drafter.parameters(), *models.drafter.buffers()], DRAFTER)
            tracker.count([head.weight], HEAD)
            moments = (value for state in self.optimizer.state.values() for value in state.values())
            tracker.count((value for value in moments if isinstance(value, Tensor)), MOMENTS)
            with tracker:
                with tracker.part(FEATURES):
                    inputs = models.inputs(shape)
                masks: dict[str, Any] = {"make_mask": lambda *_: None} if models.is_cuda else {}  # a GPU's is small
                models.backward(inputs, tile, part=tracker.part, chunk_bytes=chunk_bytes, **masks)
                with tracker.part(MOMENTS):
                    models.step(self.optimizer)
        models.drafter.activation_checkpointing_disable()
        parts = {part: size + self.more_bytes.get(part, 0) for part, size in tracker.at_peak.items()}
        optimizer_flops = tracker.flops.pop(MOMENTS, 0)
        # The other chunks: forward and backward, and the target's own logits for soft labels.
        left_out = head.weight.numel() * num_scored - tile.weight.numel() * num_rows
        drafter_flops = tracker.flops.total() + (6 if is_soft else 4) * left_out + self._attention_flops(shape)
        micro_batches = models.recipe.train.gradient_accumulation_steps
        flops = {
            "target": float(micro_batches * self._target_flops(shape)),
            "drafter": float(micro_batches * drafter_flops),
            "optimizer": float(optimizer_flops),
        }
        return StepCost({part: size for part, size in parts.items() if size >= 1024}, flops)

    def _attention_flops(self, shape: BatchShape) -> float:
        """Count the operations of the drafter's attention: one forward pass, and 2.5 times as much backward."""
        queries = shape.num_blocks * self.models.drafter.block_size
        seen = shape.num_tokens + queries
        if self.models.is_cuda:
            seen = shape.num_tokens / 2 + self.models.drafter.block_size
        config = self.models.drafter.config
        width = config.num_attention_heads * config.head_dim
        return 3.5 * config.num_hidden_layers * 4 * shape.batch_size * width * queries * seen

    def _target_flops(self, shape: BatchShape) -> float:
        """Count the operations in which the target computes features: each weight counts, those of experts too."""
        target = self.models.target
        last = None if self.models.recipe.loss.needs_target_probs else max(self.models.drafter.target_layer_ids) + 1
        weights = sum(parameter.numel() for parameter in target.layers[:last].parameters())
        width = target.config.num_hidden_layers * self.models.drafter.config.num_attention_heads
        scores = width * self.models.drafter.config.head_dim * shape.num_tokens
        return 2.0 * shape.batch_size * shape.num_tokens * (weights + scores)
