"""Measure how fast this machine is, and estimate the seconds of each kind of work from that.

Sizes of models and numbers of tokens come in; seconds go out. Two speeds are measured, in a fifth of a second: of
products, which is what long texts and training take, and of reading weights, which is what a new token takes. On two
cores of an AMD EPYC each kind of work was within a factor of 1.7 of its estimate (SmolLM2-135M-Instruct in fp32).
"""

from functools import cache
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

Number = int | float
MEASURING_SECONDS = 0.1
"""Time of one measurement."""
START_SECONDS = 15.0
"""Time that a command takes beside its work: to import libraries, to load and hash the target, and to write."""


class Speed(NamedTuple):
    """Speed of a machine."""

    flops: Number
    """Floating-point operations a second, in products of the training's size."""
    bytes_per_second: Number
    """Weights that are read in a second, in a product with one vector."""


ASSUMED_GPU = Speed(3e14, 2e12)
"""Speed that is assumed for a GPU that is not at hand: a third of an H100's products in bf16, and its memory's."""


class TargetSpeed(NamedTuple):
    """A target on a machine."""

    speed: Speed
    parameters: int
    num_bytes: int
    """Bytes of its weights."""

    def seconds_of(self, flops: Number) -> Number:
        """Estimate the seconds of products."""
        return flops / self.speed.flops

    def reading_seconds(self, num_tokens: Number) -> Number:
        """Estimate the seconds in which the target reads texts, with all their tokens at once."""
        return self.seconds_of(2 * self.parameters * num_tokens)

    def decoding_seconds(self, num_answers: int, num_tokens: Number, batch_size: int = 1) -> Number:
        """Estimate the seconds of plain decoding: each token reads all weights, and multiplies them with the batch.

        Args:
            num_answers: answers to write; none where it is not above 0.
            num_tokens: of each answer, or of the longest one of a batch, which takes the batch's time.
            batch_size: answers that are written at once.
        """
        num_answers = max(0, num_answers)
        products = 2 * min(batch_size, num_answers) * self.parameters
        token_seconds = self.num_bytes / self.speed.bytes_per_second + self.seconds_of(products)
        return -(-num_answers // batch_size) * num_tokens * token_seconds


@cache
def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Time a product of matrices, and one of a matrix that no cache holds with a vector."""
    a = torch.ones(512, 1024, device=device, dtype=dtype)
    b = torch.ones(1024, 1024, device=device, dtype=dtype)
    weights = torch.ones(2**14, 2**11, device=device, dtype=dtype)
    vector = torch.ones(2**11, device=device, dtype=dtype)
    return Speed(2 * a.numel() * len(b) / _seconds(a, b), weights.nbytes / _seconds(weights, vector))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> Number:
    """Time a product: the least of the blocks that fit into the time, which other programs disturb least."""
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=MEASURING_SECONDS).times)
