"""Find where a recipe computes, and measure how fast that is.

Two speeds are measured, in a fifth of a second: of products, which is what long texts and training take, and of reading
weights, which is what a new token takes.
"""

from functools import cache, partial
from typing import NamedTuple

import psutil
import torch
from torch.utils.benchmark import Timer

from dpace.config import Recipe
from dpace.system.device import default_dtype, find_device
from dpace.train.optimizer import products_dtype

Number = int | float
MEASURING_SECONDS = 0.1
"""Time of one measurement."""


class Speed(NamedTuple):
    """Speed of a machine."""

    flops: Number
    """Floating-point operations a second, in products of the training's size."""
    bytes_per_second: Number
    """Weights that are read in a second, in a product with one vector."""


ASSUMED_GPU = Speed(3e14, 2e12)
"""Speed that is assumed for a GPU that is not at hand: a third of an H100's products in bf16, and its memory's."""


@cache
def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Time a product of matrices, and one of a matrix that no cache holds with a vector."""
    ones = partial(torch.ones, device=device, dtype=dtype)
    a = ones(512, 1024)
    b = ones(1024, 1024)
    weights = ones(2**14, 2**11)
    vector = ones(2**11)
    return Speed(2 * a.numel() * len(b) / _seconds(a, b), weights.nbytes / _seconds(weights, vector))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> Number:
    """Time a product: the least of the blocks that fit into the time, which other programs disturb least."""
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=MEASURING_SECONDS).times)


class Machine(NamedTuple):
    """Where a recipe computes."""

    is_cpu: bool
    memory: int
    """Bytes that are free for it."""
    dtype: torch.dtype
    """Precision of the target's weights."""
    products: torch.dtype
    """Precision of the products in which a drafter is trained."""
    speed: Speed
    """Speed of the target's products."""
    training_speed: Speed
    """Speed of the products in which a drafter is trained."""


def find_machine(recipe: Recipe, memory: int | None = None) -> Machine:
    """Find out where a recipe would compute, and how fast.

    Args:
        recipe: names the device and the dtype.
        memory: bytes to plan for, of a GPU where no device is named; by default what is free on this machine.

    Raises:
        ValueError: see `dpace.system.device.find_device`.
    """
    is_here = memory is None or recipe.device == "cpu" or torch.accelerator.is_available()
    device = find_device(recipe.device) if is_here else torch.device("cuda")
    is_cpu = device.type == "cpu"
    if memory is None:
        memory = psutil.virtual_memory().available if is_cpu else torch.accelerator.get_memory_info(device)[0]
    dtypes = getattr(torch, recipe.dtype, default_dtype(device)), products_dtype(recipe.train, device)
    speeds = (measure_speed(device, dtype) if is_here else ASSUMED_GPU for dtype in dtypes)
    return Machine(is_cpu, memory, *dtypes, *speeds)
