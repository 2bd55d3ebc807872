"""Results of decoding: single steps, and whole responses with their times."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dpace.metrics import Acceptance
from dpace.system.device import synchronize


class Step(NamedTuple):
    """The result of one forward pass of the target."""

    token_ids: list[int]
    """Emitted tokens, in order."""
    accepted: int
    """Number of accepted draft tokens among them."""
    width: int
    """Number of tokens that the target read: the last token and the verified draft tokens; 0 for the prompt."""
    copied: int = 0
    """Number of accepted tokens that were copied, from the text or from earlier answers, and not drafted."""


@dataclass(frozen=True)
class Generation:
    """A response, its verifications and its times."""

    token_ids: list[int]
    """The response without the prompt; ends with the stop token where there was one."""
    accepted_lengths: list[int]
    """Number of accepted draft tokens of each verification, in order; empty for plain decoding."""
    emitted_lengths: list[int]
    """Number of tokens emitted by each verification: one more, except where an accepted token ended the text."""
    widths: list[int]
    """Number of tokens that the target read in each verification; 1 where nothing was drafted."""
    block_size: int
    prefill_seconds: float
    """Seconds up to and including the first token."""
    decode_seconds: float
    """Seconds for all further tokens."""
    num_copied: int = 0
    """Number of accepted tokens that were copied, from the text or from earlier answers, and not drafted."""

    @classmethod
    def from_steps(
        cls, steps: Sequence[Step], block_size: int, *, prefill_seconds: float, decode_seconds: float
    ) -> "Generation":
        """Put the steps of a response together, that of the prompt first; with block size 1 nothing was verified."""
        verified = steps[1:] if block_size > 1 else []
        return cls(
            [token for step in steps for token in step.token_ids],
            [step.accepted for step in verified],
            [len(step.token_ids) for step in verified],
            [step.width for step in verified],
            block_size,
            prefill_seconds,
            decode_seconds,
            sum(step.copied for step in verified),
        )

    @property
    def num_decode_tokens(self) -> int:
        """Number of tokens after the first."""
        return len(self.token_ids) - 1

    @property
    def acceptance(self) -> Acceptance:
        """Statistics of the verifications."""
        without_bonus = sum(a == e for a, e in zip(self.accepted_lengths, self.emitted_lengths, strict=True))
        return Acceptance.from_lengths(self.accepted_lengths, self.block_size, without_bonus)


def read_clock(device: torch.device) -> float:
    """Read a clock in seconds, after the device has finished its work."""
    synchronize(device)
    return time.perf_counter()


def collect(steps: Iterator[Step], block_size: int, device: torch.device) -> Generation:
    """Run all steps and time them."""
    started = read_clock(device)
    done = [next(steps)]
    first = read_clock(device)
    done += steps
    return Generation.from_steps(
        done, block_size, prefill_seconds=first - started, decode_seconds=read_clock(device) - first
    )
