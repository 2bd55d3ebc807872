"""How fast this machine multiplies and reads memory, measured in a moment."""

import time
from typing import NamedTuple

import torch

ASSUMED_GPU_FLOPS = 3e14
"""Operations a second that are assumed for a GPU that is not at hand: a third of an H100's in bf16."""
MOMENT = 0.1
"""Seconds of one measurement."""


class Speed(NamedTuple):
    """Speed of a machine."""

    flops: float
    """Floating-point operations a second, in products of the training's size."""
    bytes_per_second: float
    """Memory that is read in a second."""


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Time a product and a sum on a device, for a fifth of a second."""
    a = torch.ones(512, 1024, device=device, dtype=dtype)
    b = torch.ones(1024, 1024, device=device, dtype=dtype)
    block = torch.ones(2**24, device=device)
    return Speed(2 * a.numel() * len(b) / _seconds(lambda: a @ b), block.nbytes / _seconds(block.sum))


def _seconds(work) -> float:
    """Time one call: the least of those that fit into a moment, which other programs disturb least."""
    work()
    best, end = float("inf"), time.perf_counter() + MOMENT
    while time.perf_counter() < end:
        start = time.perf_counter()
        float(work().flatten()[0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return best
