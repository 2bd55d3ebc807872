"""Take a few real steps, and answer some prompts, on this machine, and compare them with a plan."""

import time
from collections.abc import Sequence
from pathlib import Path

from dpace.config import Recipe
from dpace.plan.lines import count, duration, size
from dpace.plan.step import Models, make_drafter
from dpace.plan.training import TrainingPlan, mean_answer
from dpace.prompts.prompts import Prompt
from dpace.respond.in_process import answer_batches
from dpace.system.device import find_device, synchronize
from dpace.target import Target
from dpace.target.locate import find_target
from dpace.train.progress import PeakMemory

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
        prompts: some of these are answered, and the lengths give another time; none where answers are known.

    Raises:
        ValueError: the plan is for a device that is not here.
    """
    if not plan.machine.is_here:
        raise ValueError("--calibrate takes steps on this machine, which has no GPU; leave it out, or --device cpu")
    device = find_device(recipe.device)
    bytes_before = PeakMemory(device).bytes or 0
    target = Target.load(find_target(recipe.target), dtype=plan.machine.dtype, device=recipe.device)
    models = Models(target, make_drafter(target, vars(recipe.drafter)), recipe, plan.machine.is_cuda)
    head = target.head
    if rows := plan.conversations.shape.num_head_rows:
        head = head._replace(weight=head.weight[:rows].contiguous())
    memory = PeakMemory(device)
    optimizer = models.optimizer()
    kept = models.inputs(plan.conversations.shape) if plan.features == "kept" else {}
    seconds = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        for _ in range(recipe.train.gradient_accumulation_steps):
            models.backward({**kept} or models.inputs(plan.conversations.shape), head)
        models.step(optimizer)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    taken = (memory.bytes or 0) - (0 if plan.machine.is_cuda else bytes_before)
    step_seconds = min(seconds[1:])
    total = "" if plan.num_steps is None else f", {duration(step_seconds * plan.num_steps)} for all steps"
    lines = [
        f"measured here: {step_seconds:.3g} s for the largest step{total}; memory {size(taken)}, "
        f"{taken / plan.memory.peak_bytes:.2f} times the plan"
    ]
    return [*lines, _answer(recipe, plan, target, prompts)] if prompts else lines


def _answer(recipe: Recipe, plan: TrainingPlan, target: Target, prompts: Sequence[Prompt]) -> str:
    """Answer some prompts; write how long the answers are, and what a training takes with all of that length."""
    chosen = prompts[:: -(-len(prompts) // NUM_ANSWERS)]
    responses = [response for batch in answer_batches(target, chosen, recipe.respond) for response in batch]
    limit = recipe.respond.max_new_tokens
    conversation = sum(len(response.token_ids) for response in responses) / len(responses)
    share = conversation / plan.conversations.mean_tokens
    seconds = plan.seconds([Path(recipe.output) / "drafter"])
    total = seconds["steps"] + share * (seconds["hidden states"] + seconds["tau"])
    return (
        f"{count(sum(len(response.response_spans) for response in responses), 'answer')} here: "
        f"{mean_answer(responses, limit):.0f} tokens on average, of up to {limit}, in conversations of "
        f"{conversation:.0f}: about {duration(total)} for all steps"
    )
