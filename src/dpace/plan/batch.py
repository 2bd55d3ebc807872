"""The batch that a step is planned for, and what the step takes."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.train.optimizer import MuonAdamW

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
