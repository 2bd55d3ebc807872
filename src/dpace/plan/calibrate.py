"""A few real steps and answers on this machine, beside what was planned."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss import block_loss
from dpace.plan.lines import count, duration, size
from dpace.plan.step import Models, make_inputs, read_shape
from dpace.plan.training import TrainingPlan, known_conversations, plan_training
from dpace.prompts.prompts import Prompt
from dpace.respond.in_process import answer_batches
from dpace.system.device import find_device, synchronize
from dpace.target import Target
from dpace.target.locate import find_target
from dpace.train.loop import score_batch
from dpace.train.progress import PeakMemory
from dpace.train.run import choose_conversations
from dpace.weights import uniform_weights

NUM_STEPS = 3
"""Steps that are taken; the first one is not timed."""
NUM_ANSWERS = 8
"""Prompts that are answered where there are no answers yet."""


def calibrate(recipe: Recipe, plan: TrainingPlan, prompts: Sequence[Prompt] = ()) -> list[str]:
    """Take real steps of the largest micro-batch on this machine, and compare them with a plan.

    Memory is what the process takes more than before it loaded the target; on a GPU, what is allocated.

    Args:
        recipe: every setting.
        plan: of it.
        prompts: some of these are answered, and the lengths give another plan; none where answers are known.

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
    measured = (
        f"measured here: {step:.3g} s for the largest step{total}; memory {size(found)}, "
        f"{found / plan.step.step_bytes:.2f} times the plan"
    )
    return [measured, *([_answer_some(recipe, plan, target, prompts)] if prompts else [])]


def _answer_some(recipe: Recipe, plan: TrainingPlan, target: Target, prompts: Sequence[Prompt]) -> str:
    """Answer some prompts, and say how long they are and what all steps take at these lengths."""
    chosen = prompts[:: -(-len(prompts) // NUM_ANSWERS)]
    responses = [response for batch in answer_batches(target, chosen, recipe.respond) for response in batch]
    lengths = [end - start for response in responses for start, end in response.response_spans]
    sample = known_conversations(*choose_conversations(responses, [], recipe), recipe)
    means = {"mean_tokens": sample.mean_tokens, "mean_blocks": sample.mean_blocks}
    again = plan_training(
        recipe, read_shape(find_target(recipe.target)), plan.conversations._replace(**means), plan.place
    )
    time = "" if again.seconds is None else f": about {duration(again.seconds)} for all steps"
    return (
        f"{count(len(lengths), 'answer')} here: {sum(lengths) / len(lengths):.0f} tokens on average, of up to "
        f"{recipe.respond.max_new_tokens}, in conversations of {sample.mean_tokens:.0f}{time}"
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
        out, blocks = score_batch(
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
