"""Find the largest training that fits into a memory, and say it in a sentence."""

from collections.abc import Callable

from dpace.config import TrainConfig
from dpace.plan.batch import BatchShape
from dpace.plan.facts import size
from dpace.plan.training import TrainingPlan

LARGEST = {"batch_size": 64, "num_anchors": 4096}
"""Largest values that are tried."""
SMALLEST = {"batch_size": 1, "num_anchors": 1, "max_length": 64}
NEAR = 16
"""The largest value that fits is found to one part in this number."""


MOST_LOOKS = 14
"""Most steps that are looked at between the smallest and the largest value."""


def find_largest(peak: Callable[[int], int], room: int, low: int, high: int) -> int:
    """Find about the largest number from `low` to `high` whose peak fits, 0 for none.

    It looks along the chord of the peaks and in the middle, in turn.

    Args:
        peak: gives the bytes for a number; grows with it.
        room: bytes that there are.
        low: the smallest number.
        high: the largest number.
    """
    at_low, at_high = peak(low), peak(high)
    if at_low > room:
        return 0
    if at_high <= room:
        return high
    for look in range(MOST_LOOKS):
        if high - low <= max(1, low // NEAR):
            break
        share = 0.5 if look % 2 else (room - at_low) / (at_high - at_low)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        at_middle = peak(middle)
        if at_middle > room:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return low


def reshape(shape: BatchShape, option: str, value: int) -> BatchShape:
    """Give the largest micro-batch after an option of training was set."""
    if option == "batch_size":
        return shape._replace(batch_size=value)
    if option == "num_anchors":
        return shape._replace(num_blocks=value)
    length, validation = min(shape.num_tokens, value), min(shape.validation_tokens, value)
    return shape._replace(
        num_tokens=length,
        num_blocks=min(shape.num_blocks, length - 1),
        validation_tokens=validation,
        validation_blocks=min(shape.validation_blocks, max(0, validation - 1)),
    )


def say_what_fits(plan: TrainingPlan, train: TrainConfig) -> list[str]:
    """Say the largest batch and number of anchors that fit, or what to change where none does."""
    memory, shape = size(plan.place.memory), plan.conversations.shape

    def largest(option: str, at: BatchShape = shape, checkpointing: bool | None = None) -> int:
        def peak(value: int) -> int:
            return plan.paper.look(reshape(at, option, value), checkpointing=checkpointing).peak_bytes

        now = shape.num_tokens if option == "max_length" else getattr(train, option)
        low, high = (now, max(now, LARGEST[option])) if plan.fits else (SMALLEST[option], now)
        return find_largest(peak, plan.room, low, high)

    if plan.fits:
        batch, anchors = largest("batch_size"), largest("num_anchors")
        return [
            f"fits in {memory}: also --train.batch-size {batch}, or --train.num-anchors {anchors}",
            f"the loss computes logits in chunks of {size(plan.step.chunk_bytes)} (--loss.chunk-mib)",
        ]
    chunk = plan.step.chunk_bytes
    while chunk >= 2**21 and plan.paper.look(shape, chunk_bytes=chunk).peak_bytes > plan.room:
        chunk //= 4
    found = {option: largest(option) for option in SMALLEST}
    ways = [
        f"--train.{option.replace('_', '-')} {value} instead of {getattr(train, option)}"
        for option, value in found.items()
        if value
    ]
    if plan.paper.look(shape, chunk_bytes=chunk).peak_bytes <= plan.room:
        ways.append(f"--loss.chunk-mib {chunk // 2**20} instead of {plan.step.chunk_bytes // 2**20}")
    if not train.gradient_checkpointing and plan.paper.look(shape, checkpointing=True).peak_bytes <= plan.room:
        ways.append("--train.gradient-checkpointing, which costs time")
    if not ways:
        anchors = largest("num_anchors", reshape(shape, "batch_size", 1), checkpointing=True)
        together = f"--train.batch-size 1 --train.gradient-checkpointing --train.num-anchors {anchors}"
        other = "a smaller target, more memory, or several GPUs with --train.target-shard fsdp"
        ways = [together if anchors else other]
    needed = size(plan.peak_bytes)
    return [f"does not fit in {memory}: it needs {needed}. Each of these makes it fit:", *(f"  {way}" for way in ways)]
