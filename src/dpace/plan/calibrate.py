"""Take a few real steps on this machine, and compare them with a plan."""

import time

from dpace.config import Recipe
from dpace.plan.lines import duration, size
from dpace.plan.step import Models, make_drafter
from dpace.plan.training import TrainingPlan
from dpace.system.device import find_device, synchronize
from dpace.target import Target
from dpace.target.locate import find_target
from dpace.train.progress import PeakMemory

NUM_STEPS = 3
"""Steps that are taken; the first one is not timed."""


def calibrate(recipe: Recipe, plan: TrainingPlan) -> str:
    """Take real steps of the largest micro-batch on this machine, and compare them with a plan.

    Memory is what the process takes more than before it loaded the target; on a GPU, what is allocated.

    Args:
        recipe: every setting.
        plan: of it.

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
    return (
        f"measured here: {step_seconds:.3g} s for the largest step{total}; memory {size(taken)}, "
        f"{taken / plan.step.peak_bytes:.2f} times the plan"
    )
