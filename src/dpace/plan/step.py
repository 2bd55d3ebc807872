"""Memory by part, and operations, of one training step: the real step, run on fake tensors."""

from contextlib import nullcontext
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dpace.blocks import Blocks, dense_mask
from dpace.fast.head_scores import SOFT_COPIES, wanted_chunk_bytes
from dpace.head import Head
from dpace.loss import block_loss, frozen_head_nll
from dpace.plan.batch import (
    ACTIVATIONS,
    DRAFTER,
    FEATURES,
    GRADIENT,
    HEAD,
    MASK,
    MOMENTS,
    PARTS,
    TARGET,
    WORK,
    BatchShape,
    Models,
    StepPlan,
    make_inputs,
)
from dpace.plan.memory import MemoryTracker
from dpace.plan.paper import on_paper
from dpace.train.scoring import score_batch
from dpace.views import blocks_hidden
from dpace.weights import uniform_weights


class PaperStep:
    """Takes training steps on fake tensors, of any shape, and says what they take.

    On a GPU, attention keeps no scores, which is what flex_attention does, and the drafter computes in bf16, as
    autocast lets it.

    Args:
        models: made inside `dpace.plan.paper.on_paper`.
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
                out, blocks, _ = score_batch(
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
