"""Measure how fast this machine multiplies matrices, and estimate the seconds of a training step from it."""

from functools import cache

import torch
from torch.utils.benchmark import Timer

Number = int | float
TIMING_SECONDS = 1.0
"""How long a product is timed."""
FEW_ROWS = 64
"""Rows of a product whose speed stands for what is no large product: as many as prompts that are answered together."""
BESIDE_PRODUCTS = 0.4
"""What a training step on a CPU does beside its products, as a share of these, at that speed."""
GPU_FLOPS = 3e14
"""Operations in a second by a GPU that is not at hand: a third of an H100's products in bf16."""


@cache
def measure_flops(device: torch.device, dtype: torch.dtype, num_rows: int = 512) -> Number:
    """Time a product, by default one as large as a training's, and return operations a second."""
    if device.type != "cpu" and not torch.accelerator.is_available():
        return GPU_FLOPS
    rows = torch.ones(num_rows, 2**11, device=device, dtype=dtype)
    weights = torch.ones(2**11, 2**10, device=device, dtype=dtype)
    timer = Timer("rows @ weights", globals=locals(), num_threads=torch.get_num_threads())
    # The least time is the one that other programs disturbed least.
    seconds = min(timer.blocked_autorange(min_run_time=TIMING_SECONDS).times)
    # A product is a multiplication and an addition for each row and weight.
    return 2 * len(rows) * weights.numel() / seconds


def expected_step_seconds(
    operations: Number, device: torch.device, products: torch.dtype, dtype: torch.dtype
) -> Number:
    """Estimate the seconds of training steps from the operations of their products.

    Args:
        operations: a multiplication and an addition are two.
        device: where the steps are taken.
        products: dtype of the factors in large products.
        dtype: of the target.
    """
    seconds = operations / measure_flops(device, products)
    if device.type == "cpu":
        seconds += BESIDE_PRODUCTS * operations / measure_flops(device, dtype, FEW_ROWS)
    return seconds
