"""Time the steps of decoding on this machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.drafter.views import draft_block
from dpace.drafter.vocabulary import DraftHead
from dpace.fast.cache import make_cache
from dpace.target import Target

FILLER_TOKENS = 128
"""Number of tokens before the timed steps."""
DRAFT, FIRST_DRAFT = 0, -1
"""Kinds of steps beside verifications, whose kind is their width."""
NUM_ROUNDS = 5
"""Number of times that each step is timed."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of a step on this machine."""

    verify_seconds: Sequence[float]
    """Seconds in which the target reads 1, 2, ... tokens."""
    draft_seconds: float
    """Seconds of the drafter with the head."""
    reading_seconds: float = 0.0
    """Additional seconds of the first draft, in which the drafter reads the prompt."""

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding."""
        return 1 / self.verify_seconds[0]

    def best_width(self, reach: Sequence[float]) -> tuple[int, float]:
        """Choose the verification length that gives the most expected tokens per second.

        Args:
            reach: for each draft slot that may be verified, the probability that it and all slots before it are
                accepted.

        Returns:
            The width, 1 (none of the draft) to `len(reach) + 1`, and the expected number of emitted tokens.
        """
        best, best_rate, emitted = (1, 1.0), 1 / (self.draft_seconds + self.verify_seconds[0]), 1.0
        for width, probability in enumerate(reach, start=2):
            emitted += probability
            rate = emitted / (self.draft_seconds + self.verify_seconds[width - 1])
            if rate > best_rate:
                best, best_rate = (width, emitted), rate
        return best


def measure_costs(target: Target, drafter: Drafter, *, temperature: float = 0.0) -> StepCosts:
    """Measure the seconds of decoding steps on this machine; takes about a second for a small model.

    Args:
        target: timed while it reads 1 to `block_size` tokens.
        drafter: timed while it drafts a block.
        temperature: above 0, tokens are drawn, which takes longer than choosing the most likely ones.
    """
    timer = StepTimer([single_steps(target, drafter, temperature=temperature)], drafter.block_size)
    timer.run_at_least(NUM_ROUNDS)
    return timer.costs(min)[0]  # the minimum, because disturbances only make steps slower


def single_steps(
    target: Target, drafter: Drafter, *, temperature: float = 0.0, context: int = FILLER_TOKENS
) -> Callable[[int], None]:
    """Make a function that runs one step of decoding one prompt.

    Its argument is the number of tokens to verify, or `DRAFT`, or `FIRST_DRAFT`.

    Memory: keys and values of the context, and its features.

    Args:
        target: reads 1 to `block_size` tokens.
        drafter: drafts a block.
        temperature: temperature of the draws.
        context: number of tokens before the step.
    """
    sampler = Sampler(temperature, seed=0, device=target.device)
    device, size = target.device, drafter.block_size
    filler = torch.full((1, max(context, size)), drafter.mask_token_id, device=device)
    cache = make_cache(target.config, filler.shape[1] + size)
    with torch.inference_mode():
        target.hidden(filler, cache=cache)
    num_features = len(drafter.target_layer_ids) * target.hidden_size
    draft_head = DraftHead(target, drafter.vocabulary)
    features = torch.zeros(1, filler.shape[1], num_features, device=device, dtype=target.model.dtype)

    @torch.inference_mode()
    def step(width: int) -> None:
        if width > 0:
            logits = target.logits(target.hidden(filler[:, :width], cache=cache).flatten(0, 1))
            sampler.draw(sampler.scores(logits, []), 0).tolist()
            cache.crop(-width)
            return
        read = features if width == FIRST_DRAFT else features[:, :4]
        hidden = draft_block(drafter, target, filler[:, :size], read)
        logits = draft_head.logits(hidden[0, 1:])
        draft_head.tokens(logits)
        drafter.confidences(logits)  # waits for the device, as drawing does

    return step


class StepTimer:
    """A timer for step functions such as those of `single_steps`, which take turns in each round."""

    def __init__(self, steps: Sequence[Callable[[int], None]], block_size: int):
        self.steps, self.num_rounds = steps, 0
        self.widths = [width for width in sorted({1, 2, 3, 4, 6, 8, 12, 16, block_size}) if width <= block_size]
        self.seconds = [{kind: [] for kind in (FIRST_DRAFT, DRAFT, *self.widths)} for _ in steps]

    def run(self) -> None:
        """Run one round; the first is a warm-up, which is not counted."""
        for step, seconds_by_kind in zip(self.steps, self.seconds, strict=True):
            for kind, seconds in seconds_by_kind.items():
                start = time.perf_counter()
                step(kind)
                if self.num_rounds:
                    seconds.append(time.perf_counter() - start)
        self.num_rounds += 1

    def run_at_least(self, num_rounds: int) -> None:
        """Run rounds until at least `num_rounds` are counted."""
        while self.num_rounds <= num_rounds:
            self.run()

    def costs(self, choose: Callable[[Sequence[float]], float]) -> list[StepCosts]:
        """Give the costs of each function, where `choose` picks one value from its rounds' seconds.

        Widths that were not timed are interpolated. A width counts as no slower than a wider one.
        """
        costs = []
        for seconds_by_kind in self.seconds:
            seconds = {kind: choose(rounds) for kind, rounds in seconds_by_kind.items()}
            widths = range(1, self.widths[-1] + 1)
            verify_seconds = np.interp(widths, self.widths, [seconds[width] for width in self.widths])
            verify_seconds = np.minimum.accumulate(verify_seconds[::-1])[::-1]
            reading = max(0.0, seconds[FIRST_DRAFT] - seconds[DRAFT])
            costs.append(StepCosts(verify_seconds.tolist(), seconds[DRAFT], reading))
        return costs
