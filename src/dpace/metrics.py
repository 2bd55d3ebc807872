"""Turn accepted lengths, tokens and seconds into tau, rates and speedups with their intervals.

Training, decoding and servers are measured by the same functions. `estimate` makes every interval: over prompts, and
over training seeds where there are several.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
"""Bootstrap samples of an interval."""
LEAST_TAU = 1.05
"""Mean acceptance length below which a drafter has learned nothing that counts; without one it is 1."""
MIN_PROMPTS = 6
"""Least number of prompts for a 95 % interval: with five, all lie on one side of the median one time in sixteen."""
NORMAL = 1.959964
"""The normal distribution's 97.5 % quantile."""
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for a 95 % interval, by degrees of freedom from 1."""
Statistic = Callable[[np.ndarray], np.ndarray]
"""Makes numbers, "...", from ratios, "side ..."."""
FIRST: Statistic = itemgetter(0)


@dataclass(frozen=True)
class Acceptance:
    """Accepted lengths of many verifications, from which every statistic follows.

    `accepted_length` counts the draft tokens accepted in one verification, 0 to `block_size - 1`, without the bonus
    token.
    """

    histogram: Sequence[Any] | np.ndarray
    """Number of verifications by accepted length, `block_size` counts; or one such row a prompt.

    `interval` resamples the rows.
    """
    block_size: int
    """Number of slots in a block: the anchor and `block_size - 1` draft slots."""
    num_without_bonus: int | Sequence[int] | np.ndarray = 0
    """Verifications whose last accepted token ended the text, so that no bonus token follows; a number, or one a
    prompt."""
    bounds: tuple[float, ...] = ()
    """With a selector, tau of each slot's own best token, and of the target's token wherever it is a candidate."""

    @classmethod
    def from_lengths(cls, accepted_lengths: Sequence[int], block_size: int, num_without_bonus: int = 0) -> "Acceptance":
        """Count the accepted lengths of one response."""
        counts = np.bincount(np.array(accepted_lengths, int), minlength=block_size)
        return cls(counts, block_size, num_without_bonus)

    @classmethod
    def of_prompts(cls, responses: Sequence["Acceptance"]) -> "Acceptance":
        """Combine responses, one row each."""
        if not responses:
            raise ValueError("there is no response to combine; give at least one")
        return cls(
            np.concatenate([response.rows for response in responses]),
            responses[0].block_size,
            np.concatenate([response.without_bonus for response in responses]),
        )

    @classmethod
    def pooled(cls, runs: Sequence["Acceptance"]) -> "Acceptance":
        """Add up verifications of the same prompts, row by row: several turns, or several seeds."""
        rows = np.sum([run.rows for run in runs], axis=0)
        without_bonus = np.sum([run.without_bonus for run in runs], axis=0)
        return cls(rows, runs[0].block_size, without_bonus)

    @property
    def rows(self) -> np.ndarray:
        """The histograms, "prompt length"."""
        return np.atleast_2d(np.asarray(self.histogram, int))

    @property
    def without_bonus(self) -> np.ndarray:
        """`num_without_bonus`, one a prompt."""
        return np.atleast_1d(np.asarray(self.num_without_bonus, int))

    @property
    def counts(self) -> np.ndarray:
        """Number of verifications by accepted length, all prompts together."""
        return self.rows.sum(0)

    @property
    def emitted_tokens(self) -> np.ndarray:
        """Accepted draft tokens and bonus tokens, one number a prompt."""
        # An accepted length of `k` emits `k + 1` tokens.
        return self.rows @ (np.arange(self.block_size) + 1) - self.without_bonus

    @property
    def tau(self) -> float:
        """Mean acceptance length: emitted tokens per verification, pooled; 1 to `block_size`, nan without any."""
        num_verifications = self.rows.sum()
        if not num_verifications:
            return math.nan
        return float(self.emitted_tokens.sum() / num_verifications)

    @property
    def reach_rate(self) -> np.ndarray:
        """Share of verifications that accepted all slots 1..k, for k = 1 .. block_size - 1 (unconditional)."""
        # Verifications that accepted `k` draft tokens or more: a running sum from the longest.
        reached = self.counts[::-1].cumsum()[::-1]
        return reached[1:] / max(1, reached[0])

    def interval(self) -> tuple[float, float]:
        """Estimate the 95 % interval of tau over prompts.

        Returns:
            Lower and upper end, in tokens; (nan, nan) without a verification, and for fewer than `MIN_PROMPTS`.
        """
        return tau_estimate([[self]])[1:]


def student_t(degrees: int) -> float:
    """Return Student's t for a 95 % interval; within 0.1 % beyond the table.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.5.
    """
    if degrees <= len(STUDENT_T):
        return STUDENT_T[degrees - 1]
    # The first terms of a series in 1 / degrees around the normal distribution's quantile.
    z = NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def widening(num_prompts: int) -> float:
    """Return by how much the interval of a bootstrap is too narrow, for two prompts or more.

    A bootstrap takes the spread of few prompts for the spread of all, and its quantiles for the normal distribution's.
    With 6 prompts, its intervals of 95 % hold 85 % of the time. With this factor they hold 91 to 96 %, which a test
    counts; they hold less often where a few prompts are of another kind, which few samples miss (docs/measure.md).

    Source: Hesterberg, What Teachers Should Know About the Bootstrap (2015), section 5.3.
    """
    return student_t(num_prompts - 1) / NORMAL * math.sqrt(num_prompts / (num_prompts - 1))


def ratio(totals: np.ndarray) -> np.ndarray:
    """Divide tops by bottoms, "2 ..."; nan where the bottom is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(totals[1] > 0, totals[0] / totals[1], np.nan)


def estimate(sides: Sequence[Sequence[Any]], statistic: Statistic = FIRST) -> tuple[float, float, float]:
    """Compute a number from ratios of totals, with its 95 % interval over prompts and training seeds.

    The prompts' part is a bootstrap, times `widening`: each of `NUM_RESAMPLES` draws prompts with replacement, the same
    ones for all sides and seeds, and always the same ones for as many prompts. So it is paired. The seeds' part is
    `t * s / sqrt(n)`: `s` is the standard deviation of the numbers of the `n` seeds, and `t` is Student's, with `n - 1`
    degrees of freedom. A bootstrap of few seeds would be far too narrow. The parts are independent, so their squares
    are added.

    Args:
        sides: top and bottom of each side's ratio for each prompt, "side seed prompt 2"; what has no seeds has an axis
            of one there.
        statistic: makes the number from the sides' ratios, "side ..."; by default, it is the first side's ratio.

    Returns:
        The number and the ends of its interval. The ends are nan for fewer than `MIN_PROMPTS`; all are nan where a
        bottom is 0.

    Source: Student, The probable error of a mean (1908).
    """
    num_seeds = len(sides[0])
    # (2, side, seed, prompt), with 2 for tops and bottoms
    totals = np.moveaxis(np.array(sides, float).reshape(len(sides), num_seeds, -1, 2), -1, 0)
    num_prompts = totals.shape[-1]
    value = float(statistic(ratio(totals.sum((-2, -1)))))
    if np.isnan(value) or num_prompts < MIN_PROMPTS:
        return value, math.nan, math.nan
    drawn = np.random.default_rng(0).integers(num_prompts, size=(NUM_RESAMPLES, num_prompts))
    # (2, side, resample): seeds are pooled, and each resample adds up its own prompts.
    resampled = totals.sum(-2)[..., drawn].sum(-1)
    quantiles = np.nanquantile(statistic(ratio(resampled)), [0.025, 0.975])
    # Below the value and above it, the first one negative.
    distances = widening(num_prompts) * (quantiles - value)
    if num_seeds > 1:
        # (side, seed) goes in, one number a seed comes out.
        seed_values = statistic(ratio(totals.sum(-1)))
        seed_distance = student_t(num_seeds - 1) * seed_values.std(ddof=1) / num_seeds**0.5
        distances = np.hypot(distances, seed_distance) * [-1, 1]  # `hypot` loses the sign
    low, high = (value + distances).tolist()
    return value, low, high


def tau_gain(runs: Sequence[Acceptance], other_runs: Sequence[Acceptance]) -> tuple[float, float, float]:
    """Compute how much larger one tau is than another on the same prompts, as a ratio minus 1.

    Args:
        runs: one for each training seed, each with one row a prompt.
        other_runs: of the same seeds and prompts, in the same order.

    Returns:
        The gain of the pooled taus and the ends of its 95 % interval; nan where a side has no verification. The ends
        are nan for fewer than `MIN_PROMPTS`.
    """
    return tau_estimate([runs, other_runs], lambda taus: taus[0] / taus[1] - 1)


def tau_estimate(sides: Sequence[Sequence[Acceptance]], statistic: Statistic = FIRST) -> tuple[float, float, float]:
    """Compute a number from the taus of several sides, by default the first one's tau, with its interval of `estimate`.

    Args:
        sides: each has one acceptance for each seed, with one row a prompt; seeds and prompts are the same for all.
        statistic: of the taus, "side ...".
    """
    side_totals = []
    for side in sides:
        # (seed, prompt, 2): the top of tau is emitted tokens, and its bottom verifications.
        side_totals.append([np.stack([run.emitted_tokens, run.rows.sum(-1)], axis=1) for run in side])
    return estimate(side_totals, statistic)
