"""A plan in lines of at most 80 columns."""

from pathlib import Path

from dpace.config import Recipe, TrainConfig
from dpace.locate import find_target
from dpace.plan.batch import StepPlan
from dpace.plan.facts import check_disk, count, duration, size
from dpace.plan.paper import read_shape
from dpace.plan.training import Conversations, TrainingPlan, find_place, plan_training


def say_training(recipe: Recipe, conversations: Conversations, folder: str | Path, *, drafters: int = 1) -> list[str]:
    """Say what the training of a recipe takes, before the target is loaded.

    Args:
        recipe: every setting.
        conversations: as far as they are known.
        folder: that is written to.
        drafters: number of drafters that are trained with the same settings.

    Raises:
        ValueError: the disk has no room for it, or the drafter cannot work with this target.
    """
    plan = plan_training(recipe, read_shape(find_target(recipe.target)), conversations, find_place(recipe))
    disk = check_disk(folder, drafters * plan.disk_bytes, "make room, or name another folder with --output")
    lines = training_lines(plan, recipe.train)
    if drafters > 1 and plan.seconds is not None:
        lines[0] = f"{drafters} x {lines[0]}"
        lines.append(f"all {drafters} drafters: about {duration(drafters * plan.seconds)}")
    if not plan.fits:
        lines.append("it may not fit in memory: `dpace plan` says what to lower")
    return [*lines, disk]


def training_lines(plan: TrainingPlan, train: TrainConfig) -> list[str]:
    """Say in three lines what a training takes."""
    step, known, place = plan.step, plan.conversations, plan.place
    steps = "steps unknown: no prompts yet" if plan.num_steps is None else count(plan.num_steps, "step")
    batch = train.batch_size * train.gradient_accumulation_steps * place.ranks
    tokens = known.shape.num_tokens
    of = "an unknown number of conversations"
    if known.number is not None:
        tokens = int(known.number * known.mean_tokens)
        of = f"{count(known.number, 'conversation')} ({'' if known.is_known else 'up to '}{tokens:,} tokens)"
    kept = f"kept ({size(plan.kept_bytes)})" if plan.is_kept else "computed in every step"
    if plan.stored_bytes:
        kept = f"on disk ({size(plan.stored_bytes)})"
    rate = f"{plan.flops_per_second / 1e12:.3g} TFLOP/s{'' if place.is_here else ', assumed'}"
    about = "about" if known.is_known else "up to"  # all conversations are then as long as they may be
    time = "time unknown" if plan.seconds is None else f"{about} {duration(plan.seconds)} at {rate}"
    return [
        f"training: {steps} of {batch}, {of}",
        f"drafter: {step.drafter_parameters / 1e6:.4g} M parameters, {size(plan.drafter_bytes)}; hidden states {kept}",
        f"memory: {size(plan.peak_bytes)} at the peak, {size(place.memory)} free ({place.name}); {time}",
    ]


def memory_lines(step: StepPlan) -> list[str]:
    """Write the memory of a step by part, and its operations."""
    lines = ["memory at the peak of a training step, computed:"]
    lines += [f"  {part:<28} {size(number):>10}" for part, number in step.parts.items()]
    lines.append(f"  {'sum':<28} {size(step.step_bytes):>10}")
    if step.validation_bytes:
        lines.append(f"memory while a validation response is scored: {size(step.validation_bytes)}")
    total = sum(step.flops.values())
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in step.flops.items())
    lines.append(f"operations of the largest step: {total / 1e12:.3g} TFLOP ({shares})")
    return lines
