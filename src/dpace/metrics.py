"""Turn accepted lengths into tau, rates and intervals, the same for training and decoding."""

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

    def interval(self, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap the interval of tau over prompts.

        Args:
            confidence: share of resamples inside, in (0, 1).
            num_resamples: number of bootstrap samples.
            seed: seed of the resampling.

        Returns:
            Lower and upper end, in tokens; (nan, nan) without a verification, and for one prompt, which says nothing
            of others.
        """
        if not self.num_verifications or len(self.rows) < 2:
            return float("nan"), float("nan")
        generator = np.random.default_rng(seed)
        picks = generator.integers(len(self.rows), size=(num_resamples, len(self.rows)))
        emitted = self.emitted_tokens[picks].sum(-1)
        verifications = self.rows.sum(-1)[picks].sum(-1)
        taus = emitted / np.maximum(verifications, 1)
        low, high = np.quantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def reach_interval(
        self, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap the interval of `reach_rate` over prompts: lower and upper end for each slot."""
        generator = np.random.default_rng(seed)
        picks = generator.integers(len(self.rows), size=(num_resamples, len(self.rows)))
        reached = self.rows[picks].sum(1)[:, ::-1].cumsum(-1)[:, ::-1]
        rates = reached[:, 1:] / np.maximum(reached[:, :1], 1)
        low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return low, high


def _resampled_ratio(tops: np.ndarray, bottoms: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Resample prompts, and divide totals of `tops` by those of `bottoms`, both quantities by prompt."""
    picks = np.random.default_rng(seed).integers(tops.shape[-1], size=(num_resamples, tops.shape[-1]))
    sums = [np.stack([row[picks].sum(-1) for row in rows]) for rows in (tops, bottoms)]
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
    """Divide the tokens a second with the drafter by those without: ratio of totals, prefill excluded.

    Args:
        tokens: decoded with the drafter, one number a prompt.
        seconds: decode time of these tokens.
        plain_tokens: decoded without a drafter, for the same prompts in the same order.
        plain_seconds: decode time of these tokens.
        num_resamples: number of bootstrap samples of prompts.
        seed: seed of the resampling.

    Returns:
        The speedup and the ends of its 95 % interval, which are None for fewer than `MIN_PROMPTS`; nan and None where a
        side decoded nothing.
    """
    tops, bottoms = np.array([tokens, plain_tokens], float), np.array([seconds, plain_seconds], float)
    if not tops.sum(-1).all():
        return float("nan"), None, None
    value = tops.sum(-1) / bottoms.sum(-1)
    if len(tokens) < MIN_PROMPTS:
        return float(value[0] / value[1]), None, None
    ratios = _resampled_ratio(tops, bottoms, num_resamples, seed)
    low, high = np.quantile(ratios[0] / np.maximum(ratios[1], 1e-12), [0.025, 0.975])
    return float(value[0] / value[1]), float(low), float(high)


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


def tau_gain(
    ours: Sequence[Acceptance], theirs: Sequence[Acceptance], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Compute how much larger one tau is than another on the same prompts, as a ratio minus 1.

    Args:
        ours: one for each training seed, each with one row a prompt.
        theirs: of the same seeds and prompts, in the same order.
        num_resamples: paired bootstrap samples of prompts, and of seeds where there are several: a resample takes the
            same prompts and seeds for both sides. Few seeds say little about others, and the interval is then too
            narrow.
        seed: of the resampling.

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
    tau, taus = resample_taus([ours, theirs], num_resamples=num_resamples, seed=seed)
    if not (tau > 0).all():  # one is 0 or nan
        return float("nan"), float("nan"), float("nan")
    gain = float(tau[0] / tau[1] - 1)
    if shapes[0][0] < 2:
        return gain, float("nan"), float("nan")
    low, high = np.quantile(taus[0] / np.maximum(taus[1], 1e-12) - 1, [0.025, 0.975])
    return gain, float(low), float(high)


def resample_taus(
    sides: Sequence[Sequence[Acceptance]], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the taus of several sides, and resample their prompts and seeds together.

    A bootstrap of two levels: a resample draws prompts, and training seeds, with replacement. All sides get the same
    ones, so quantiles of any function of the resampled taus are a paired interval of it.

    Args:
        sides: each has one acceptance for each seed, with one row a prompt; seeds and prompts are the same for all.
        num_resamples: number of bootstrap samples.
        seed: of the resampling.

    Returns:
        The pooled tau of each side, " side", nan where it has no verification; and the resampled ones, "side resample".
    """
    # axes: side, emitted tokens or verifications, seed, prompt
    totals = np.array(
        [[[a.emitted_tokens for a in side], [a.rows.sum(-1) for a in side]] for side in sides],
        dtype=float,
    )
    generator = np.random.default_rng(seed)
    prompts = generator.integers(totals.shape[3], size=(num_resamples, totals.shape[3]))
    seeds = generator.integers(totals.shape[2], size=(num_resamples, totals.shape[2]))
    by_seed = np.stack([totals[:, :, i][..., prompts].sum(-1) for i in range(totals.shape[2])], axis=-1)
    picked = np.take_along_axis(by_seed, np.broadcast_to(seeds, (*by_seed.shape[:2], *seeds.shape)), axis=-1).sum(-1)
    emitted, verifications = np.moveaxis(totals.sum((-2, -1)), 1, 0)
    tau = np.divide(emitted, verifications, out=np.full(len(sides), np.nan), where=verifications > 0)
    return tau, picked[:, 0] / np.maximum(picked[:, 1], 1e-12)
