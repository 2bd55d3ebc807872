"""Measure what the steps of decoding take on this machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.fast.cache import make_cache
from dpace.target import Target
from dpace.views import draft_block

FILLER_TOKENS = 128
"""Context that step times are measured with."""
DRAFT, FIRST_DRAFT = 0, -1
"""Steps that are timed beside verifications, which are named by their width."""
NUM_ROUNDS = 5
"""Times that each step is timed."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of a step on this machine."""

    verify_seconds: Sequence[float]
    """Of the target reading 1, 2, ... tokens."""
    draft_seconds: float
    """Of the drafter with the head."""
    reading_seconds: float = 0.0
    """What the first draft takes beyond that, in which the drafter reads the prompt."""

    @property
    def plain_rate(self) -> float:
        """Tokens a second without drafting."""
        return 1 / self.verify_seconds[0]

    def best_width(self, reach: Sequence[float]) -> tuple[int, float]:
        """The tokens to verify that give the most expected tokens a second.

        Args:
            reach: for each draft slot, the probability that it and all before it are accepted; as many as may be verified.

        Returns:
            The width, 1 (none of the draft) to `len(reach) + 1`, and the expected tokens emitted.
        """
        best, best_rate, emitted = (1, 1.0), 1 / (self.draft_seconds + self.verify_seconds[0]), 1.0
        for width, probability in enumerate(reach, start=2):
            emitted += probability
            rate = emitted / (self.draft_seconds + self.verify_seconds[width - 1])
            if rate > best_rate:
                best, best_rate = (width, emitted), rate
        return best


def measure_costs(target: Target, drafter: Drafter, *, temperature: float = 0.0) -> StepCosts:
    """Measure what steps take on this machine; about a second for a small model.

    Args:
        target: reads 1 to `block_size` tokens.
        drafter: drafts a block.
        temperature: drawing tokens takes longer than choosing the most likely ones.
    """
    timer = StepTimer([single_steps(target, drafter, temperature=temperature)], drafter.block_size)
    timer.run_at_least(NUM_ROUNDS)
    return timer.costs(min)[0]  # whatever disturbs a step makes it slower


def single_steps(
    target: Target, drafter: Drafter, *, temperature: float = 0.0, context: int = FILLER_TOKENS
) -> Callable[[int], None]:
    """A function that does what one step of one prompt does: verify so many tokens, or `DRAFT`, or `FIRST_DRAFT`.

    Memory: keys and values of the context, and its features.

    Args:
        target: reads 1 to `block_size` tokens.
        drafter: drafts a block.
        temperature: of the draws.
        context: tokens before the step.
    """
    sampler = Sampler(temperature, seed=0, device=target.device)
    device, size = target.device, drafter.block_size
    filler = torch.full((1, max(context, size)), drafter.mask_token_id, device=device)
    cache = make_cache(target.config, filler.shape[1] + size)
    with torch.inference_mode():
        target.hidden(filler, cache=cache)
    num_features = len(drafter.target_layer_ids) * target.hidden_size
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
        logits = target.logits(hidden[0, 1:])
        logits.argmax(-1)
        drafter.confidences(logits)  # waits for the device, as drawing does

    return step


class StepTimer:
    """Times what functions like that of `single_steps` do; all of them take their turns in each round."""

    def __init__(self, steps: Sequence[Callable[[int], None]], block_size: int):
        self.steps, self.num_rounds = steps, 0
        self.widths = [width for width in sorted({1, 2, 3, 4, 6, 8, 12, 16, block_size}) if width <= block_size]
        self.seconds = [{kind: [] for kind in (FIRST_DRAFT, DRAFT, *self.widths)} for _ in steps]

    def run(self) -> None:
        """One round; the first is a warm-up, which is not counted."""
        for step, of_step in zip(self.steps, self.seconds, strict=True):
            for kind, seconds in of_step.items():
                start = time.perf_counter()
                step(kind)
                if self.num_rounds:
                    seconds.append(time.perf_counter() - start)
        self.num_rounds += 1

    def run_at_least(self, num_rounds: int) -> None:
        """Further rounds, where fewer counted so far."""
        while self.num_rounds <= num_rounds:
            self.run()

    def costs(self, choose: Callable[[Sequence[float]], float]) -> list[StepCosts]:
        """Of each function, from what is chosen of its rounds' seconds. A width counts as no slower than a wider one; others are interpolated."""
        found = []
        for of_step in self.seconds:
            seconds = {kind: choose(of_kind) for kind, of_kind in of_step.items()}
            widths = range(1, self.widths[-1] + 1)
            verify_seconds = np.interp(widths, self.widths, [seconds[width] for width in self.widths])
            verify_seconds = np.minimum.accumulate(verify_seconds[::-1])[::-1]
            reading = max(0.0, seconds[FIRST_DRAFT] - seconds[DRAFT])
            found.append(StepCosts(verify_seconds.tolist(), seconds[DRAFT], reading))
        return found
