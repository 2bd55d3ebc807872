"""Turn accepted lengths, tokens and seconds into tau, rates and speedups with their intervals.

Training, decoding and servers are measured by the same functions. Every interval here is a bootstrap over prompts, and
over training seeds where there are several: `resample_sums` and `interval_ends`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
"""Bootstrap samples of an interval."""
MIN_PROMPTS = 6
"""Least number of prompts for a 95 % interval: with five, all lie on one side of the median one time in sixteen."""


@dataclass(frozen=True)
class Acceptance:
    """Accepted lengths of many verifications, from which every statistic follows.

    `accepted_length` counts the draft tokens accepted in one verification, 0 to `block_size - 1`, without the bonus
    token.
    """

    histogram: Sequence[int] | Sequence[Sequence[int]] | np.ndarray
    """Number of verifications by accepted length, `block_size` counts; or one such row a prompt.

    `interval` resamples the rows.
    """
    block_size: int
    """Number of slots in a block: the anchor and `block_size - 1` draft slots."""
    num_without_bonus: int | Sequence[int] | np.ndarray = 0
    """Verifications whose last accepted token ended the text, so that no bonus token follows; a number, or one a
    prompt."""

    def __post_init__(self):
        """Check the shape of the histogram."""
        if self.rows.shape[-1] != self.block_size:
            raise ValueError(
                f"the histogram has {self.rows.shape[-1]} counts; a block of {self.block_size} has accepted lengths 0 "
                f"to {self.block_size - 1}, so {self.block_size}"
            )

    @classmethod
    def from_lengths(cls, accepted_lengths: Iterable[int], block_size: int, num_without_bonus: int = 0) -> "Acceptance":
        """Count the accepted lengths of one response."""
        histogram = np.bincount(np.fromiter(accepted_lengths, dtype=np.int64), minlength=block_size)
        return cls(histogram, block_size, num_without_bonus)

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
    def pooled(cls, parts: Sequence["Acceptance"]) -> "Acceptance":
        """Add up verifications of the same prompts, row by row: several turns, or several seeds."""
        rows = np.sum([part.rows for part in parts], 0)
        return cls(rows, parts[0].block_size, np.sum([part.without_bonus for part in parts], 0))

    @property
    def rows(self) -> np.ndarray:
        """The histograms, "prompt length"."""
        return np.atleast_2d(np.asarray(self.histogram, dtype=np.int64))

    @property
    def without_bonus(self) -> np.ndarray:
        """`num_without_bonus`, one a prompt."""
        return np.atleast_1d(np.asarray(self.num_without_bonus, dtype=np.int64))

    @property
    def counts(self) -> np.ndarray:
        """Number of verifications by accepted length, all prompts together."""
        return self.rows.sum(0)

    @property
    def num_verifications(self) -> int:
        """Number of verifications."""
        return int(self.counts.sum())

    @property
    def total_without_bonus(self) -> int:
        """`num_without_bonus`, all prompts together."""
        return int(self.without_bonus.sum())

    @property
    def num_emitted_tokens(self) -> int:
        """Accepted draft tokens and bonus tokens."""
        return int(self.emitted_tokens.sum())

    @property
    def emitted_tokens(self) -> np.ndarray:
        """Accepted draft tokens and bonus tokens, one number a prompt."""
        return self.rows @ (np.arange(self.block_size) + 1) - self.without_bonus

    @property
    def tau(self) -> float:
        """Mean acceptance length: emitted tokens per verification, pooled; 1 to `block_size`, nan without any."""
        return self.num_emitted_tokens / self.num_verifications if self.num_verifications else float("nan")

    @property
    def acceptance_rate(self) -> float:
        """Ratio of accepted to proposed draft tokens, 0 to 1."""
        proposed = self.num_verifications * (self.block_size - 1)
        return float((self.counts * np.arange(self.block_size)).sum() / proposed) if proposed else float("nan")

    @property
    def reach_rate(self) -> np.ndarray:
        """Share of verifications that accepted all slots 1..k, for k = 1 .. block_size - 1 (unconditional)."""
        reached = self.counts[::-1].cumsum()[::-1]
        return reached[1:] / max(1, reached[0])

    @property
    def slot_acceptance_rate(self) -> np.ndarray:
        """How often slot k was accepted given that 1..k-1 were, from k = 1; nan where never reached."""
        reached = self.counts[::-1].cumsum()[::-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return reached[1:] / reached[:-1]

    def interval(self) -> tuple[float, float]:
        """Bootstrap the 95 % interval of tau over prompts.

        Returns:
            Lower and upper end, in tokens; (nan, nan) without a verification, and for one prompt, which says nothing
            of others.
        """
        return ratio_interval(self.emitted_tokens, self.rows.sum(-1))

    def reach_interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap the 95 % interval of `reach_rate` over prompts: lower and upper end for each slot."""
        counts = resample_sums(self.rows.T[:, None])
        reached = counts[::-1].cumsum(0)[::-1]
        return interval_ends(reached[1:] / np.maximum(reached[:1], 1))


def resample_sums(values: np.ndarray) -> np.ndarray:
    """Sum quantities over `NUM_RESAMPLES` resamples of their prompts and training seeds: each interval's bootstrap.

    A resample draws prompts, and seeds, with replacement, the same ones for all quantities. So quantiles of any
    function of the sums are an interval of it, paired where the function compares sides. Few seeds say little about
    others, and the interval is then too narrow.

    Args:
        values: "... seed prompt"; what has no seeds has an axis of one there.

    Returns:
        The sums, "... resample"; always the same ones for the same values.
    """
    generator = np.random.default_rng(0)
    num_seeds, num_prompts = values.shape[-2:]
    prompts = generator.integers(num_prompts, size=(NUM_RESAMPLES, num_prompts))
    seeds = generator.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    by_seed = np.stack([values[..., i, :].take(prompts, -1).sum(-1) for i in range(num_seeds)], -1)
    return np.take_along_axis(by_seed, np.broadcast_to(seeds, (*by_seed.shape[:-2], *seeds.shape)), -1).sum(-1)


def interval_ends(samples: np.ndarray) -> tuple[Any, Any]:
    """Return the ends of the 95 % interval of bootstrap samples, "... resample": two arrays, or two numbers."""
    low, high = np.quantile(samples.T, [0.025, 0.975], axis=0)
    return (low, high) if samples.ndim > 1 else (float(low), float(high))


def ratio_interval(tops: Sequence[int] | np.ndarray, bottoms: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """Bootstrap the 95 % interval of a ratio of totals of counts, both by prompt.

    It is (nan, nan) for fewer than two prompts, and where nothing was counted.
    """
    if len(tops) < 2 or not np.any(bottoms):
        return float("nan"), float("nan")
    return interval_ends(_resample_ratio(np.array([[tops], [bottoms]], float))[1])


def _resample_ratio(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide the sums of two quantities, "2 ... seed prompt", and those of their resamples.

    Returns:
        The ratio, "...", nan over 0; and the resampled ones, "... resample".
    """
    tops, bottoms = totals.sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(bottoms > 0, tops / bottoms, np.nan)
    resampled = resample_sums(totals)
    return ratio, resampled[0] / np.maximum(resampled[1], 1e-12)


def _compare_ratios(totals: np.ndarray, least_prompts: int, base: int) -> tuple[float, float, float]:
    """Divide the ratio of the first side by that of the second, and subtract a base.

    Args:
        totals: top and bottom of the ratios, "2 side seed prompt".
        least_prompts: with fewer the ends of the interval are nan.
        base: 1 for a gain, 0 for a factor.

    Returns:
        The number and the ends of its 95 % interval; all are nan where a ratio is 0 or has no value.
    """
    ratio, resampled = _resample_ratio(totals)
    if not (ratio > 0).all():
        return float("nan"), float("nan"), float("nan")
    value = float(ratio[0] / ratio[1] - base)
    if totals.shape[-1] < least_prompts:
        return value, float("nan"), float("nan")
    return value, *interval_ends(resampled[0] / np.maximum(resampled[1], 1e-12) - base)


def decode_speedup(
    tokens: Sequence[int], seconds: Sequence[float], plain_tokens: Sequence[int], plain_seconds: Sequence[float]
) -> tuple[float, float, float]:
    """Divide the tokens a second with the drafter by those without: ratio of totals, prefill excluded.

    Args:
        tokens: decoded with the drafter, one number a prompt.
        seconds: decode time of these tokens.
        plain_tokens: decoded without a drafter, for the same prompts in the same order.
        plain_seconds: decode time of these tokens.

    Returns:
        The speedup and the ends of its 95 % interval, which are nan for fewer than `MIN_PROMPTS`; all are nan where a
        side decoded nothing.
    """
    totals = np.array([[[tokens], [plain_tokens]], [[seconds], [plain_seconds]]], float)
    return _compare_ratios(totals, MIN_PROMPTS, base=0)


def published_tau(accepted_lengths: Sequence[Sequence[int]]) -> float:
    """Compute tau as published tables have it: the mean of responses' means of `accepted_length + 1`.

    Not what `Acceptance.tau` is: short responses count as much as long ones, and a last verification counts a bonus
    token that was not emitted.

    Args:
        accepted_lengths: accepted lengths of each response; a response without a verification is left out.

    Source: `dflash/benchmark.py` of z-lab/dflash.
    """
    means = [np.mean(lengths) + 1 for lengths in accepted_lengths if len(lengths)]
    return float(np.mean(means)) if means else float("nan")


def published_speedup(
    tokens: Sequence[int], seconds: Sequence[float], plain_tokens: Sequence[int], plain_seconds: Sequence[float]
) -> float:
    """Compute the speedup as published tables have it: plain over drafted mean seconds a token.

    Source: `dflash/benchmark.py` of z-lab/dflash.
    """
    means = []
    for counts, times in ((tokens, seconds), (plain_tokens, plain_seconds)):
        seconds_per_token = [time / count for count, time in zip(counts, times, strict=True) if count]
        means.append(np.mean(seconds_per_token) if seconds_per_token else np.nan)
    return float(means[1] / means[0])


def tau_gain(ours: Sequence[Acceptance], theirs: Sequence[Acceptance]) -> tuple[float, float, float]:
    """Compute how much larger one tau is than another on the same prompts, as a ratio minus 1.

    Args:
        ours: one for each training seed, each with one row a prompt.
        theirs: of the same seeds and prompts, in the same order.

    Returns:
        The gain of the pooled taus and the ends of its 95 % interval; nan where a side has no verification. The ends
        are nan for one prompt.

    Raises:
        ValueError: different numbers of prompts or seeds.
    """
    shapes = [[len(a.rows) for a in side] for side in (ours, theirs)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"the numbers of prompts by seed are {shapes[0]} and {shapes[1]}; a paired gain needs the same seeds and "
            "prompts on both sides: measure both again on the same prompts"
        )
    return _compare_ratios(_tau_totals([ours, theirs]), 2, base=1)


def resample_taus(sides: Sequence[Sequence[Acceptance]]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the taus of several sides, and resample their prompts and seeds together, see `resample_sums`.

    Args:
        sides: each has one acceptance for each seed, with one row a prompt; seeds and prompts are the same for all.

    Returns:
        The pooled tau of each side, " side", nan where it has no verification; and the resampled ones, "side resample".
    """
    return _resample_ratio(_tau_totals(sides))


def _tau_totals(sides: Sequence[Sequence[Acceptance]]) -> np.ndarray:
    """Return the emitted tokens and the verifications of several sides, "2 side seed prompt"."""
    emitted = [[a.emitted_tokens for a in side] for side in sides]
    return np.array([emitted, [[a.rows.sum(-1) for a in side] for side in sides]], float)
