"""Predict decode_speedup at other verification lengths and concurrencies."""

from collections.abc import Mapping, Sequence

import numpy as np

from dpace.config import BenchConfig
from dpace.data.prompts import Prompt
from dpace.decode.costs import StepCosts
from dpace.measure.results import BenchResults
from dpace.measure.rows import Prediction, ResponseRecord, Row
from dpace.measure.timing import BatchTimings, StepTimers, groups_of, measure_together


def tokens_at(width: int, counts: Sequence[int]) -> float:
    """Predict what verifications of `width` tokens emit, from the accepted lengths of whole drafts.

    A narrow verification often begins the next block inside a run of tokens that the whole draft had right. The new
    draft is taken to be right up to where that run ended, and wrong there; where the run ended with its block, it may
    go on as runs do that are as long. On the demo's drafter that was within 1.5 % of tau at widths 2, 4 and 6; cutting
    whole drafts (`E[min(accepted, width - 1)]`) was up to 7 % too low, as it forgets that long runs take several narrow
    verifications.

    Args:
        width: 2 to `len(counts)`, the block size.
        counts: verifications of whole drafts by accepted length, 0 to `block_size - 1`.
    """
    last = len(counts) - 1
    emitted = np.arange(1, last + 2)
    runs = np.stack(
        [emitted, np.ceil(emitted / width)]
    )  # tokens and verifications, for runs that end before their blocks

    def until_wrong(at_least: int) -> np.ndarray:
        """Expected tokens and verifications of a block with so many right draft tokens, and of its run."""
        shares = np.where(emitted > at_least, counts, 0) / max(1, sum(counts[at_least:]))
        ended = (runs * shares)[:, :last].sum(-1)
        if width == last + 1:
            return ended + shares[last] * runs[:, last]
        if at_least == last - width:  # where the next block of an open run begins again and again
            return (ended + shares[last] * np.array([width, 1])) / max(1e-9, 1 - shares[last])
        return ended + shares[last] * (np.array([width, 1]) + until_wrong(last - width))

    tokens, verifications = until_wrong(0)
    return float(tokens / max(1e-9, verifications))


def predict_speedups(
    row: Row, single_costs: StepCosts, together: Mapping[int, StepCosts] | None = None, concurrency: int = 1
) -> list[float]:
    """Predict decode_speedup for verify widths 2 to `block_size`, for one or several prompts at once.

    The responses of the benchmark are put in groups as `measure_together` does, each with its own number of tokens and
    of verifications; at other widths these are as many times more as `tokens_at` is smaller. Rows that are done leave
    their group, and a step costs what it costs for those that are left; the drafter reads the prompts once. The seconds
    of a token and of a step with a whole draft are those that the benchmark found; only the ratios to them, of other
    widths and of several prompts, come from costs that were measured outside it. One prompt at once with whole drafts
    is thus what was measured.

    Args:
        row: of results.json, measured with whole drafts.
        single_costs: of steps of one prompt.
        together: of steps of several by the number of rows, 1 among them; in between they are interpolated.
        concurrency: prompts at once. Where there are fewer responses, they are taken again.
    """
    plain, ours, costs = row.plain_responses, row.responses, together or {}
    if concurrency == 1:
        groups, costs = [[i] for i in range(len(ours))], {1: single_costs}
    else:
        first_turns = [i for i, r in enumerate(ours) if r.turn == 0]
        groups = groups_of(first_turns * -(-concurrency // len(first_turns)), concurrency)
    tokens, our_tokens = ([r.decode_tokens for r in side] for side in (plain, ours))
    verifications = [sum(r.histogram) for r in ours]
    plain_costs = {rows: (cost.verify_seconds[0], 0.0) for rows, cost in costs.items()}
    plain_slowness = _seconds(plain) / max(1e-9, sum(tokens) * single_costs.verify_seconds[0])
    plain_rate = _rate(tokens, tokens, groups, plain_costs) / plain_slowness
    whole = (
        sum(verifications) * (single_costs.draft_seconds + single_costs.verify_seconds[-1])
        + len(ours) * single_costs.reading_seconds
    )
    slowness = _seconds(ours) / max(1e-9, whole)
    counts, speedups = row.acceptance.counts.tolist(), []
    for width in range(2, len(counts) + 1):
        stretch = tokens_at(len(counts), counts) / max(1e-9, tokens_at(width, counts))
        steps = [stretch * count for count in verifications]
        step_costs = {
            rows: (cost.draft_seconds + cost.verify_seconds[width - 1], cost.reading_seconds)
            for rows, cost in costs.items()
        }
        rate = _rate(our_tokens, steps, groups, step_costs) / max(1e-9, slowness)
        speedups.append(rate / max(1e-9, plain_rate))
    return speedups


def _seconds(responses: Sequence[ResponseRecord]) -> float:
    return sum(r.decode_seconds for r in responses)


def _rate(
    tokens: Sequence[int],
    steps: Sequence[float | int],
    groups: Sequence[Sequence[int]],
    costs: Mapping[int, tuple[float, float]],
) -> float:
    """Tokens a second of groups of responses that take so many steps each.

    The costs are those of a step and of a group, by the number of rows that are left.
    """
    sizes, seconds = sorted(costs), 0.0
    for group in groups:
        of_step, of_group = (
            np.interp(range(len(group) + 1), sizes, [costs[size][kind] for size in sizes]) for kind in (0, 1)
        )
        seconds, done = seconds + of_group[-1], 0.0
        for left, count in zip(range(len(group), 0, -1), sorted(steps[i] for i in group), strict=True):
            seconds += (count - done) * of_step[left]
            done = count
    return sum(tokens[i] for group in groups for i in group) / max(1e-9, float(seconds))


def predict(
    results: BenchResults, prompts: Sequence[Prompt], config: BenchConfig, timers: StepTimers
) -> list[Prediction]:
    """Predict every row that was measured with whole drafts, and check it if `config.predict`.

    Memory: keys and values of as many prompts as twice the largest concurrency.

    Args:
        results: of `dpace.measure.benchmark.bench`.
        prompts: of the benchmark.
        config: without `predict`, predictions are for one prompt at a time only; with it, several prompts are also
            decoded at once.
        timers: which ran during the benchmark.

    Returns:
        One for each drafter, set, temperature and concurrency.
    """
    measured = {(r.drafter, r.set, r.temperature, r.width): r.decode_speedup for r in results.rows}
    together = BatchTimings({}, {})
    if config.predict:
        together = measure_together(timers.target, timers.drafters, prompts, config, timers.contexts)
    predictions = []
    for row in results.whole_blocks:
        key = row.drafter, row.set, row.temperature
        single_costs = timers.costs(*key)
        widths = list(range(2, row.block_size + 1))
        for concurrency in config.concurrencies if config.predict else (1,):
            costs = together.costs.get((*key, concurrency))
            if concurrency == 1:
                checked = [measured.get((*key, width)) for width in [*widths[:-1], "full"]]
            elif costs:
                checked = [None] * (len(widths) - 1) + [together.speedups.get((*key, concurrency))]
            else:
                continue
            predictions.append(
                Prediction(
                    drafter=row.drafter,
                    set=row.set,
                    temperature=row.temperature,
                    concurrency=concurrency,
                    widths=widths,
                    speedups=predict_speedups(row, single_costs, costs, concurrency),
                    measured=checked,
                )
            )
    return predictions
