"""What decoding gives: steps as they come, and the whole response with what it took."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dpace.metrics import Acceptance


class Step(NamedTuple):
    """What one forward pass of the target gave."""

    token_ids: list[int]
    """Emitted, in order."""
    accepted: int
    """Draft tokens among them."""
    width: int
    """Tokens that the target read: the last token and the draft tokens that it verified; 0 for the prompt."""
    copied: int = 0
    """Accepted tokens that a prompt lookup proposed, not the drafter."""


@dataclass(frozen=True)
class Generation:
    """A response and what it took."""

    token_ids: list[int]
    """The response without the prompt; ends with the stop token where there was one."""
    accepted_lengths: list[int]
    """Accepted draft tokens of each verification, in order; empty for plain decoding."""
    emitted_lengths: list[int]
    """Tokens emitted by each verification: one more, but not where an accepted token ended the text."""
    widths: list[int]
    """Tokens that the target read in each: 1 where nothing was drafted."""
    block_size: int
    prefill_seconds: float
    """Up to and including the first token."""
    decode_seconds: float
    """All further tokens."""
    num_copied: int = 0
    """Accepted tokens that a prompt lookup proposed, not the drafter."""

    @property
    def num_decode_tokens(self) -> int:
        """Tokens after the first."""
        return len(self.token_ids) - 1

    @property
    def acceptance(self) -> Acceptance:
        """Statistics of the verifications."""
        without_bonus = sum(a == e for a, e in zip(self.accepted_lengths, self.emitted_lengths, strict=True))
        return Acceptance.from_lengths(self.accepted_lengths, self.block_size, without_bonus)


def read_clock(device: torch.device) -> float:
    """Read a clock in seconds, after the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def collect(steps: Iterator[Step], block_size: int, device: torch.device) -> Generation:
    """Run all steps and take the time."""
    started = read_clock(device)
    response = list(next(steps).token_ids)
    first_seconds = read_clock(device) - started
    done = list(steps)
    decode_seconds = read_clock(device) - started - first_seconds
    for step in done:
        response += step.token_ids
    drafted = done if block_size > 1 else []
    return Generation(
        response,
        [step.accepted for step in drafted],
        [len(step.token_ids) for step in drafted],
        [step.width for step in drafted],
        block_size,
        first_seconds,
        decode_seconds,
        sum(step.copied for step in drafted),
    )
