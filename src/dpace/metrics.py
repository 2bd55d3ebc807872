"""Statistics of accepted lengths: tau, acceptance rates, speedups, and their intervals.

Training, decoding and servers all use these definitions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

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
    """Number of verifications whose last accepted token ended the text, so that no bonus token follows.

    One number in all, or one a prompt.
    """

    def __post_init__(self):
        """Check the shape of the histogram."""
        if self.rows.shape[-1] != self.block_size:
            raise ValueError(
                f"the histogram has {self.rows.shape[-1]} counts; a block of {self.block_size} has accepted lengths "
                f"0 to {self.block_size - 1}: give {self.block_size} counts"
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
            np.concatenate([response.missing for response in responses]),
        )

    @classmethod
    def pooled(cls, parts: Sequence["Acceptance"]) -> "Acceptance":
        """Add up verifications of the same prompts, row by row: several turns, or several seeds."""
        rows, missing = np.sum([part.rows for part in parts], 0), np.sum([part.missing for part in parts], 0)
        return cls(rows, parts[0].block_size, missing)

    @property
    def rows(self) -> np.ndarray:
        """The histograms, "prompt length"."""
        return np.atleast_2d(np.asarray(self.histogram, dtype=np.int64))

    @property
    def missing(self) -> np.ndarray:
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
    def num_missing(self) -> int:
        """`num_without_bonus`, all prompts together."""
        return int(self.missing.sum())

    @property
    def num_emitted_tokens(self) -> int:
        """Number of accepted draft tokens and bonus tokens."""
        return int(self._emitted(self.rows).sum() - self.missing.sum())

    @staticmethod
    def _emitted(rows: np.ndarray) -> np.ndarray:
        return (rows * (np.arange(rows.shape[-1]) + 1)).sum(-1)

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
        """Share of verifications whose slots 1..k were all accepted (unconditional).

        One value for each k = 1 .. block_size - 1.
        """
        reached = self.counts[::-1].cumsum()[::-1]
        return reached[1:] / max(1, reached[0])

    @property
    def slot_acceptance_rate(self) -> np.ndarray:
        """Share of accepted slots k among verifications that accepted slots 1..k-1 (conditional).

        One value for each k = 1 .. block_size - 1; nan where slot k was never reached.
        """
        reached = self.counts[::-1].cumsum()[::-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return reached[1:] / reached[:-1]

    def interval(self, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Compute the bootstrap interval of tau.

        Prompts are resampled, or single verifications where the histogram has one row.

        Args:
            confidence: share of resamples inside, in (0, 1).
            num_resamples: number of bootstrap samples.
            seed: seed of the resampling.

        Returns:
            Lower and upper end, in tokens; (nan, nan) without a verification.
        """
        if not self.num_verifications:
            return float("nan"), float("nan")
        generator = np.random.default_rng(seed)
        if len(self.rows) > 1:
            picks = generator.integers(len(self.rows), size=(num_resamples, len(self.rows)))
            emitted = (self._emitted(self.rows) - self.missing)[picks].sum(-1)
            verifications = self.rows.sum(-1)[picks].sum(-1)
        else:
            total = self.num_verifications
            rows = generator.multinomial(total, self.counts / total, size=num_resamples)
            emitted, verifications = self._emitted(rows) - self.missing.sum(), rows.sum(-1)
        taus = emitted / np.maximum(verifications, 1)
        low, high = np.quantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def reach_interval(
        self, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute the bootstrap interval of `reach_rate`, resampling prompts: both ends for each slot."""
        generator = np.random.default_rng(seed)
        picks = generator.integers(len(self.rows), size=(num_resamples, len(self.rows)))
        reached = self.rows[picks].sum(1)[:, ::-1].cumsum(-1)[:, ::-1]
        rates = reached[:, 1:] / np.maximum(reached[:, :1], 1)
        low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return low, high


def _resampled_ratio(numerators: np.ndarray, denominators: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Compute ratios of totals over resampled prompts.

    Both arguments hold one quantity a row, with one value a prompt.
    """
    picks = np.random.default_rng(seed).integers(numerators.shape[-1], size=(num_resamples, numerators.shape[-1]))
    sums = [np.stack([row[picks].sum(-1) for row in rows]) for rows in (numerators, denominators)]
    return sums[0] / np.maximum(sums[1], 1e-12)


def decode_speedup(
    tokens: Sequence[float | int],
    seconds: Sequence[float | int],
    plain_tokens: Sequence[float | int],
    plain_seconds: Sequence[float | int],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float | None, float | None]:
    """Compute the speedup: decode tokens per second with the drafter over plain decoding.

    Each side is a ratio of totals, prefill excluded.

    Args:
        tokens: decoded with the drafter, one number a prompt.
        seconds: decode time of these tokens.
        plain_tokens: decoded without a drafter, for the same prompts in the same order.
        plain_seconds: decode time of these tokens.
        num_resamples: number of bootstrap samples of prompts.
        seed: seed of the resampling.

    Returns:
        The speedup and the ends of its 95 % interval; None for the ends with fewer than `MIN_PROMPTS` prompts.
    """
    counts, times = np.array([tokens, plain_tokens], float), np.array([seconds, plain_seconds], float)
    rates = counts.sum(-1) / times.sum(-1)
    if len(tokens) < MIN_PROMPTS:
        return float(rates[0] / rates[1]), None, None
    resampled = _resampled_ratio(counts, times, num_resamples, seed)
    low, high = np.quantile(resampled[0] / resampled[1], [0.025, 0.975])
    return float(rates[0] / rates[1]), float(low), float(high)


def published_tau(accepted_lengths: Sequence[Sequence[int]]) -> float:
    """Compute tau as in published tables: the mean over responses of each mean of `accepted_length + 1`.

    It differs from `Acceptance.tau` in two ways. Short responses count as much as long ones. And a bonus token is
    counted for the last verification even where it was not emitted.

    Args:
        accepted_lengths: accepted lengths of each response; a response without a verification is left out.

    Source: `dflash/benchmark.py` of z-lab/dflash.
    """
    means = [np.mean(lengths) + 1 for lengths in accepted_lengths if len(lengths)]
    return float(np.mean(means)) if means else float("nan")


def published_speedup(
    tokens: Sequence[int], seconds: Sequence[float], plain_tokens: Sequence[int], plain_seconds: Sequence[float]
) -> float:
    """Compute the speedup as in published tables, from mean seconds per token.

    It is the mean over responses of seconds per token in plain decoding, over the same mean with the drafter.

    Source: `dflash/benchmark.py` of z-lab/dflash.
    """
    means = []
    for counts, times in ((tokens, seconds), (plain_tokens, plain_seconds)):
        seconds_per_token = [time / count for count, time in zip(counts, times, strict=True) if count]
        means.append(np.mean(seconds_per_token) if seconds_per_token else np.nan)
    return float(means[1] / means[0])


def tau_gain(
    ours: Sequence[Acceptance], theirs: Sequence[Acceptance], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Compute the gain of one tau over another on the same prompts, as a ratio minus 1.

    Args:
        ours: one for each training seed, each with one row a prompt.
        theirs: the same for the other side, with the same seeds and prompts in the same order.
        num_resamples: number of paired bootstrap samples of prompts, and of seeds where there are several. A resample
            takes the same prompts and seeds for both sides. With few seeds the interval is too narrow, because they say
            little about other seeds.
        seed: seed of the resampling.

    Returns:
        The gain of the pooled taus and the ends of its 95 % interval.

    Raises:
        ValueError: different numbers of prompts or seeds.
    """
    shapes = [[len(a.rows) for a in side] for side in (ours, theirs)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"the numbers of prompts by seed are {shapes[0]} and {shapes[1]}; a paired gain needs the same seeds and "
            "prompts on both sides: measure both again on the same prompts"
        )
    # axes: side, emitted tokens or verifications, seed, prompt
    totals = np.array(
        [[[a._emitted(a.rows) - a.missing for a in side], [a.rows.sum(-1) for a in side]] for side in (ours, theirs)],
        dtype=float,
    )
    generator = np.random.default_rng(seed)
    prompts = generator.integers(totals.shape[3], size=(num_resamples, totals.shape[3]))
    seeds = generator.integers(totals.shape[2], size=(num_resamples, totals.shape[2]))
    by_seed = np.stack([totals[:, :, i][..., prompts].sum(-1) for i in range(totals.shape[2])], axis=-1)
    picked = np.take_along_axis(by_seed, np.broadcast_to(seeds, (*by_seed.shape[:2], *seeds.shape)), axis=-1).sum(-1)
    taus, tau = picked[:, 0] / np.maximum(picked[:, 1], 1e-12), totals.sum((-2, -1))
    low, high = np.quantile(taus[0] / taus[1] - 1, [0.025, 0.975])
    return float(tau[0, 0] / tau[0, 1] / (tau[1, 0] / tau[1, 1]) - 1), float(low), float(high)
