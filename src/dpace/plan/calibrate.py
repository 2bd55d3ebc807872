"""Take a few steps of the training loop on this machine, and compare them with a plan."""

from dataclasses import replace
from math import ceil, inf
from pathlib import Path

import torch

from dpace.config import Recipe
from dpace.loss.objective import make_weigh
from dpace.plan.lines import duration, size
from dpace.plan.step import make_drafter
from dpace.plan.training import TrainingPlan
from dpace.respond.responses import Response
from dpace.system.device import find_device
from dpace.target import Target
from dpace.target.locate import find_target
from dpace.train.loop import TrainingLoop
from dpace.train.progress import PeakMemory
from dpace.train.run import choose_conversations

NUM_STEPS = 3
"""Steps that are taken; the first one is slower than the median of them."""


def calibrate(recipe: Recipe, plan: TrainingPlan) -> str:
    """Take steps of the largest micro-batch on this machine, and compare them with a plan.

    The conversations are made up: as long as the longest one, with as many different tokens as the head has rows.
    Memory is what the process takes more than before it loaded the target; on a GPU, what is allocated.

    Raises:
        ValueError: the plan is for a device that is not here.
    """
    if not plan.machine.is_here:
        raise ValueError("--calibrate takes steps on this machine, which has no GPU; leave it out, or --device cpu")
    device = find_device(recipe.device)
    bytes_before = 0 if plan.machine.is_cuda else PeakMemory(device).bytes or 0
    target = Target.load(
        find_target(recipe.target), dtype=plan.machine.dtype, device=recipe.device, device_map=recipe.device_map
    )
    memory = PeakMemory(device)

    shape = plan.conversations.shape
    rows = min(shape.num_head_rows or shape.num_tokens, len(target.head.weight))
    number = max(shape.batch_size * recipe.train.gradient_accumulation_steps, ceil(rows / shape.num_tokens))
    texts = (torch.arange(number * shape.num_tokens) % rows).split(shape.num_tokens)
    spans = [[shape.num_tokens - shape.num_blocks - 1, shape.num_tokens]]
    responses = [Response(str(index), "", [], text.tolist(), spans) for index, text in enumerate(texts)]

    recipe = replace(recipe, train=replace(recipe.train, max_steps=NUM_STEPS, grow_blocks=False))
    datasets = choose_conversations(responses, [], recipe)
    drafter = make_drafter(target, recipe.drafter)
    if plan.features != "computed in every step":
        datasets[0].keep_features(
            target, drafter.target_layer_ids, limit_bytes=inf, with_head_input=recipe.needs_target_hidden
        )
    weigh = make_weigh(recipe.loss, drafter.block_size)
    loop = TrainingLoop(drafter, target, *datasets, recipe, weigh=weigh, checkpoints=Path())  # writes none
    for batches in loop.batches_of_steps():
        loop.take_step(batches)
    seconds = loop.log.entry(loop.accelerator)["step_seconds"]
    total = "" if plan.num_steps is None else f", {duration(seconds * plan.num_steps)} for all steps"
    taken = (memory.bytes or 0) - bytes_before
    return (
        f"measured here: {seconds:.3g} s for the largest step{total}; memory {size(taken)}, "
        f"{taken / plan.step.peak_bytes:.2f} times the plan"
    )
