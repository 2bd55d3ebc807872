"""Memory by part, and operations, of one training step: the real step, run on fake tensors.

The batch that a step is planned for, and what the step takes.

Add up the bytes of all tensors that are alive, by the part of the work that made them.

Targets and drafters on paper: shapes and dtypes from `config.json`, no weights.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)

from dpace.blocks import Blocks, dense_mask
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden
from dpace.loss import block_loss, frozen_head_nll
from dpace.loss.head_scores import SOFT_COPIES, wanted_chunk_bytes
from dpace.system.loading import attention_of, translate_library_errors
from dpace.target import Target
from dpace.target.files import find_target_files
from dpace.target.head import Head
from dpace.target.probe import find_layers
from dpace.train.loop import score_batch
from dpace.train.optimizer import MuonAdamW
from dpace.weights import uniform_weights

TARGET, DRAFTER, GRADIENT, MOMENTS = "target", "drafter", "its gradient", "optimizer's moments"
FEATURES, ACTIVATIONS, MASK = "hidden states of the target", "activations of the drafter", "attention masks"
HEAD, WORK = "loss through the head", "work of the backward pass"
PARTS = (TARGET, DRAFTER, GRADIENT, MOMENTS, FEATURES, ACTIVATIONS, MASK, HEAD, WORK)
"""The parts of a step's memory, in the order in which they are shown."""


class BatchShape(NamedTuple):
    """The largest micro-batch of a run."""

    batch_size: int
    num_tokens: int
    """Tokens of the longest conversation, to which the others are padded."""
    num_blocks: int
    """Blocks of the conversation that has most of them."""
    validation_tokens: int = 0
    """Tokens of the longest validation conversation; 0 without one."""
    validation_blocks: int = 0
    """Blocks of the validation conversation that has most of them; every token of a response is an anchor there."""
    num_head_rows: int | None = None
    """Tokens that the softmax covers; None for the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one optimizer step takes."""

    parts: dict[str, int] = field(default_factory=dict)
    """Bytes that are alive at the peak of the step, by part."""
    validation_bytes: int
    """Peak in bytes while the validation responses are scored; 0 without any."""
    chunk_bytes: int
    """Logits that exist at once in the loss."""
    flops: dict[str, float] = field(default_factory=dict)
    """Floating-point operations of one optimizer step, by what does them."""
    target_parameters: int = 0
    drafter_parameters: int = 0

    @property
    def step_bytes(self) -> int:
        """Peak of the training step."""
        return sum(self.parts.values())

    @property
    def peak_bytes(self) -> int:
        """Peak of the run."""
        return max(self.step_bytes, self.validation_bytes)


class Models(NamedTuple):
    """The models of a plan; fake, or real where a step is measured."""

    target: Any
    drafter: Drafter
    recipe: Recipe
    is_cuda: bool

    def optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer that training makes."""
        train = self.recipe.train
        if train.optimizer == "muon":
            return MuonAdamW(self.drafter.named_parameters(), lr=train.learning_rate, weight_decay=train.weight_decay)
        return torch.optim.AdamW(self.drafter.parameters(), lr=train.learning_rate, fused=True)


def make_inputs(shape: BatchShape, models: Models) -> dict[str, Any]:
    """Make a micro-batch in which every block is full, with its features."""
    target, block_size = models.target, models.drafter.block_size
    rows, tokens, blocks = shape.batch_size, shape.num_tokens, shape.num_blocks
    labels = torch.zeros(rows, blocks, block_size, dtype=torch.long, device=target.device)
    anchors = torch.linspace(0, tokens - 1, blocks, device=target.device).long().expand(rows, -1)
    is_scored = torch.ones_like(labels, dtype=torch.bool)
    is_scored[..., 0] = False
    token_ids = torch.zeros(rows, tokens, dtype=torch.long, device=target.device)
    needs_last = models.recipe.loss.needs_target_probs
    return {
        "token_ids": token_ids,
        "features": target.features(token_ids, models.drafter.target_layer_ids, with_head_input=needs_last),
        "is_response": torch.ones_like(token_ids, dtype=torch.bool),
        "anchors": anchors,
        "labels": labels,
        "is_scored": is_scored,
        "is_block": torch.ones_like(anchors, dtype=torch.bool),
    }


aten = torch.ops.aten


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that operations allocate inside its `with` block, real ones or fake ones.

    A view counts once. What an operation allocates and frees inside itself is not seen.

    On fake tensors, which have no values, it also answers what depends on values: every row is chosen (at most
    `max_rows` of them), and a number that is read is 1.

    Args:
        max_rows: largest number of rows that `nonzero` gives for fake tensors.
    """

    def __init__(self, max_rows: int | None = None):
        super().__init__()
        self.max_rows = max_rows
        self.live: dict[str, int] = {}
        """Bytes that are alive now, by part."""
        self.at_peak: dict[str, int] = {}
        """Bytes that were alive when most were."""
        self.live_bytes, self.peak_bytes = 0, 0
        self._part = "other"
        self._owners: dict[int, tuple[Any, int, str]] = {}

    def forget_peak(self) -> None:
        """Start to look for the peak anew."""
        self.at_peak, self.peak_bytes = dict(self.live), self.live_bytes

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the part of the work that allocates inside the `with` block."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def count(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that exist already, or let those that are counted belong to another part."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._owners:
                reference, size, old = self._owners[key]
                self.live[old] -= size
                self.live[part] = self.live.get(part, 0) + size
                self._owners[key] = reference, size, part
            else:
                self._add(tensor, part)
        if self.live_bytes > self.peak_bytes:
            self.forget_peak()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and count what it allocated."""
        if self.max_rows is not None:
            if function is aten.nonzero.default:
                rows = min(self.max_rows, args[0].numel())
                return args[0].new_empty((rows, args[0].dim()), dtype=torch.long)
            if function is aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value, self._part)
        if self.live_bytes > self.peak_bytes:
            self.forget_peak()
        return out

    def _add(self, tensor, part):  # called at every operation, so without the types that tests check
        """Count the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._owners and (size := storage.nbytes()):
            self._owners[key] = weakref.ref(storage, lambda _: self._remove(key)), size, part
            self.live[part] = self.live.get(part, 0) + size
            self.live_bytes += size

    def _remove(self, key):
        """Take off a storage that was freed."""
        _, size, part = self._owners.pop(key)
        self.live[part] -= size
        self.live_bytes -= size


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
        self.embed_scale, self.head = 1.0, Head(weight, 1.0, getattr(self.config, "final_logit_softcapping", None))

    def features(self, token_ids: Tensor, target_layer_ids: Sequence[int], *, with_head_input: bool = False) -> Tensor:
        """Give features of the right shape."""
        width = (len(target_layer_ids) + with_head_input) * self.hidden_size
        return self.head.weight.new_empty(*token_ids.shape, width)

    @torch.no_grad()
    def run(self, token_ids: Tensor, target_layer_ids: Sequence[int], *, with_head_input: bool) -> None:
        """Run the operations that compute features, for those who count them."""
        self._run(token_ids, target_layer_ids, with_head_input=with_head_input, cache=None)


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


def make_drafter(target: PaperTarget, options: dict[str, Any]) -> Drafter:
    """Make a drafter for a target on paper; call it inside `on_paper`."""
    shape = {name: value for name, value in options.items() if name != "init"}
    return Drafter.from_target(target, **shape).requires_grad_(True)


class PaperStep:
    """Takes training steps on fake tensors, of any shape, and says what they take.

    On a GPU, attention keeps no scores, which is what flex_attention does, and the drafter computes in bf16, as
    autocast lets it.

    Args:
        models: made inside `dpace.plan.step.on_paper`.
        mode: what that yielded.
        copies_bytes: copies of the target's weights, which a fast layout needs on a CPU.
        kept_bytes: features of all conversations, where they are kept in the same memory.
    """

    def __init__(
        self,
        models: Models,
        mode: FakeTensorMode,
        *,
        copies_bytes: int = 0,
        kept_bytes: int = 0,
    ):
        self.models, self.mode = models, mode
        self.optimizer = models.optimizer()
        self.validation: dict[tuple[int, int, int], int] = {}
        with on_paper(mode):
            self.held = [torch.empty(size, dtype=torch.uint8) for size in (copies_bytes, kept_bytes)]
        models.drafter.train()

    def plan(self, shape: BatchShape) -> StepPlan:
        """Say what a step of this shape takes, and the scoring of a validation response.

        The step is the second one, when the optimizer has its moments; operations are counted in the first.
        """
        models = self.models
        with on_paper(self.mode):
            flops = _PaperRun(self, shape, None).count_flops()
        plan = self.look(shape)
        accumulated = models.recipe.train.gradient_accumulation_steps
        return replace(
            plan,
            flops={name: number * accumulated for name, number in flops.items()},
            target_parameters=sum(parameter.numel() for parameter in models.target.model.parameters()),
            drafter_parameters=sum(parameter.numel() for parameter in models.drafter.parameters()),
        )

    def look(self, shape: BatchShape, *, checkpointing: bool | None = None, chunk_bytes: int | None = None) -> StepPlan:
        """Say what memory a step of this shape takes, once `plan` was called."""
        is_on = self.models.recipe.train.gradient_checkpointing if checkpointing is None else checkpointing
        if is_on:
            self.models.drafter.activation_checkpointing_enable()
        with on_paper(self.mode):
            run = _PaperRun(self, shape, chunk_bytes)
            run.take_step()
        at_peak = run.tracker.at_peak
        parts = {part: at_peak[part] for part in PARTS if at_peak.get(part, 0) >= 1024}
        checked = shape.validation_tokens, shape.validation_blocks, run.chunk_bytes
        if checked not in self.validation:
            with on_paper(self.mode):
                self.validation[checked] = run.score_validation() if shape.validation_tokens else 0
        self.models.drafter.activation_checkpointing_disable()
        return StepPlan(parts=parts, validation_bytes=self.validation[checked], chunk_bytes=run.chunk_bytes)


class _PaperRun:
    """One step on fake tensors."""

    def __init__(self, paper: PaperStep, shape: BatchShape, chunk_bytes: int | None):
        self.models, self.optimizer, self.shape, self.held = paper.models, paper.optimizer, shape, paper.held
        models = self.models
        self.head: Head = models.target.head
        if shape.num_head_rows is not None:
            rows = self.head.weight.new_empty(shape.num_head_rows, self.head.weight.shape[1])
            self.head = self.head._replace(weight=rows)
        is_soft = models.recipe.loss.needs_target_probs
        own = (models.recipe.loss.chunk_mib or 0) * 2**20
        wanted = wanted_chunk_bytes(self.head.weight, not models.is_cuda, is_soft=is_soft)
        self.chunk_bytes = chunk_bytes or own or wanted
        num_logits = self.chunk_bytes // 4
        self.num_scored = shape.batch_size * shape.num_blocks * (models.drafter.block_size - 1)
        rows = num_logits // SOFT_COPIES // len(self.head.weight) if is_soft else isqrt(num_logits)
        self.num_rows = max(1, min(rows, self.num_scored))  # one chunk of rows; the others are like it
        self.tile: Head = self.head
        if not is_soft:  # three tiles of the vocabulary; the others are like them
            self.tile = self.head._replace(weight=self.head.weight[: 3 * max(1, num_logits // self.num_rows)])
        self.tracker = MemoryTracker(max_rows=self.num_rows)

    def count_flops(self) -> dict[str, float]:
        """Take a step and count the operations of a micro-batch."""
        models, shape, config = self.models, self.shape, self.models.target.config
        token_ids = torch.zeros(shape.batch_size, shape.num_tokens, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        try:
            with counter:
                models.target.run(
                    token_ids,
                    models.drafter.target_layer_ids,
                    with_head_input=models.recipe.loss.needs_target_probs,
                )
            of_target = float(counter.get_total_flops())
        except RuntimeError:  # layers that depend on values, such as experts: every weight counts
            of_target = 2.0 * token_ids.numel() * sum(p.numel() for p in models.target.layers.parameters())
        counter = FlopCounterMode(display=False)
        self._take(counter)
        of_drafter = float(counter.get_total_flops())
        drafter = models.drafter.config
        head, tile = (
            (6 if models.recipe.loss.needs_target_probs else 4) * x.weight.numel() for x in (self.head, self.tile)
        )
        queries = shape.num_blocks * models.drafter.block_size
        seen = shape.num_tokens / 2 + models.drafter.block_size if models.is_cuda else shape.num_tokens + queries
        size = shape.batch_size * drafter.num_attention_heads * drafter.head_dim
        of_drafter += head * self.num_scored - tile * self.num_rows
        of_drafter += 3.5 * drafter.num_hidden_layers * 4 * size * queries * seen  # 1 forward, 2.5 backward
        of_target += config.num_hidden_layers * 2 * size * shape.num_tokens**2
        return {"target": of_target, "drafter": of_drafter}

    def take_step(self) -> None:
        """Take a step and look at its memory."""
        tracker, models = self.tracker, self.models
        tracker.count([*models.target.model.parameters(), *models.target.model.buffers()], TARGET)
        tracker.count([*models.drafter.parameters(), *models.drafter.buffers()], DRAFTER)
        tracker.count([x for s in self.optimizer.state.values() for x in s.values() if isinstance(x, Tensor)], MOMENTS)
        tracker.count(self.held[:1], TARGET)
        tracker.count(self.held[1:], FEATURES)
        if self.shape.num_head_rows is not None:
            tracker.count([self.head.weight], HEAD)
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.count([p.grad], GRADIENT))
            for parameter in models.drafter.parameters()
        ]
        self._take(nullcontext())
        for handle in handles:
            handle.remove()

    def _take(self, counter: Any) -> None:
        """Take a step, with a context manager that sees the drafter's part.

        A counter of operations holds tensors longer, so it is not to see a step whose memory is looked at.
        """
        models, tracker = self.models, self.tracker
        with tracker:
            with tracker.part(FEATURES):
                inputs = make_inputs(self.shape, models)
            with tracker.part(HEAD), counter:
                out, blocks = score_batch(
                    self._draft,
                    models.target,
                    inputs,
                    models.recipe.loss,
                    drafter=models.drafter,
                    head=self.tile,
                    head_index=None,
                    weigh=lambda slots: uniform_weights(slots.is_scored),
                    make_mask=self._mask,
                    chunk_bytes=self.chunk_bytes,
                )
                loss = block_loss(out.losses, blocks.is_scored, num_items=1)
                del inputs, out
                with tracker.part(WORK):
                    loss.backward()
            with tracker.part(MOMENTS):
                torch.nn.utils.clip_grad_norm_(models.drafter.parameters(), models.recipe.train.max_grad_norm)
                self.optimizer.step()
            self.optimizer.zero_grad()

    def _draft(self, **inputs: Any) -> Any:
        """Run the drafter as `accelerate` does: in bf16 on a GPU, with a result in fp32."""
        with self.tracker.part(ACTIVATIONS):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.models.is_cuda):
                out = self.models.drafter(**inputs)
            out.last_hidden_state = out.last_hidden_state.float()
        return out

    def _mask(self, blocks: Blocks, num_context: int) -> Tensor | None:
        """Make the mask; a GPU has a small one of tiles."""
        if self.models.is_cuda:
            return None
        with self.tracker.part(MASK):
            return dense_mask(blocks, num_context)

    def score_validation(self) -> int:
        """Give the peak in bytes while a validation response is scored."""
        models, tracker = self.models, self.tracker
        drafter = models.drafter.eval()
        shape = BatchShape(1, self.shape.validation_tokens, self.shape.validation_blocks)
        tracker.forget_peak()
        with tracker, torch.no_grad(), tracker.part(WORK):
            hidden, blocks, _ = blocks_hidden(
                self._draft,
                models.target,
                make_inputs(shape, models),
                mask_token_id=drafter.mask_token_id,
                target_layer_ids=drafter.target_layer_ids,
                make_mask=self._mask,
            )
            frozen_head_nll(hidden, self.tile, blocks.labels, blocks.is_scored, chunk_bytes=self.chunk_bytes)
        drafter.train()
        return tracker.peak_bytes
