"""A few real steps on this machine, beside what was planned."""

import time
from typing import Any

import torch

from dpace.config import Recipe
from dpace.device import find_device, synchronize
from dpace.drafter import Drafter
from dpace.locate import find_target
from dpace.loss import block_loss
from dpace.plan.batch import Models, make_inputs
from dpace.plan.facts import duration, size
from dpace.plan.training import TrainingPlan
from dpace.target import Target
from dpace.train.callbacks import PeakMemory
from dpace.train.scoring import score_batch
from dpace.weights import uniform_weights

NUM_STEPS = 3
"""Steps that are taken; the first one is not timed."""


def calibrate(recipe: Recipe, plan: TrainingPlan) -> str:
    """Take real steps of the largest micro-batch on this machine, and compare them with a plan.

    Memory is what the process takes more than before it loaded the target; on a GPU, what is allocated.

    Raises:
        ValueError: the plan is for a device that is not here.
    """
    if not plan.place.is_here:
        raise ValueError("--calibrate takes steps on this machine, which has no GPU; leave it out, or --device cpu")
    device = find_device(recipe.device)
    before = PeakMemory(device)
    at_start = before.bytes or 0
    target = Target.load(find_target(recipe.target), dtype=plan.place.dtype, device=recipe.device)
    shape = {name: value for name, value in vars(recipe.drafter).items() if name != "init"}
    drafter = Drafter.from_target(target, seed=0, **shape).train()
    models = Models(target, drafter, recipe, plan.place.is_cuda)
    optimizer, seconds, peak = models.optimizer(), [], PeakMemory(device)
    head = target.head
    if plan.conversations.shape.num_head_rows:
        head = head._replace(weight=head.weight[: plan.conversations.shape.num_head_rows].contiguous())
    kept = make_inputs(plan.conversations.shape, models) if plan.is_kept else None
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        _take_step(models, head, optimizer, plan, kept)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    found = (peak.bytes or 0) - (0 if plan.place.is_cuda else at_start)
    step = min(seconds[1:])
    total = "" if plan.num_steps is None else f", {duration(step * plan.num_steps)} for all steps"
    return (
        f"measured here: {step:.3g} s for the largest step{total}; memory {size(found)}, "
        f"{found / plan.step.step_bytes:.2f} times the plan"
    )


def _take_step(
    models: Models, head, optimizer: torch.optim.Optimizer, plan: TrainingPlan, kept: dict[str, Any] | None
) -> None:
    """Take an optimizer step of the planned shape."""
    device = models.target.device

    def draft(**inputs):
        with torch.autocast(device.type, torch.bfloat16, enabled=models.is_cuda):
            return models.drafter(**inputs)

    for _ in range(models.recipe.train.gradient_accumulation_steps):
        out, blocks, _ = score_batch(
            draft,
            models.target,
            kept or make_inputs(plan.conversations.shape, models),
            models.recipe.loss,
            drafter=models.drafter,
            head=head,
            head_index=None,
            weigh=lambda slots: uniform_weights(slots.is_scored),
        )
        block_loss(out.losses, blocks.is_scored).backward()
    torch.nn.utils.clip_grad_norm_(models.drafter.parameters(), models.recipe.train.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
