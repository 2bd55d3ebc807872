"""Predict decode_speedup at other verification lengths and concurrencies.

Time decoding steps of one prompt and of several at once.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.markup import escape

from dpace.config import BenchConfig
from dpace.decode.batch import batch_steps, generate_batch
from dpace.decode.costs import StepCosts, StepTimer, single_steps
from dpace.drafter import Drafter
from dpace.measure.results import BenchResults, Prediction, ResponseRecord, Row
from dpace.prompts.prompts import Prompt
from dpace.system.progress import printable, progress_bar
from dpace.target import Target
from dpace.target.chat import encode_chat

MIN_ROUNDS = 5
"""Times, at least, that each step is timed."""
CONTEXT_STEP = 64
"""Contexts, in tokens, that steps are measured with are multiples of it."""
NUM_REPEATS = 3
"""Times that each group is decoded."""
NUM_TOGETHER = 16
"""Prompts of a set, at most, that are decoded several at once."""


def groups_of(items: list, size: int) -> list[list]:
    """Group the first `NUM_TOGETHER` items by a size, or one larger group; leave out what fills no group."""
    items = items[: max(NUM_TOGETHER, size)]
    return [items[start : start + size] for start in range(0, len(items) - size + 1, size)]


class StepTimers:
    """Times steps of one prompt between those of a benchmark, so that both see the same machine.

    Their contexts are as long as those of the set half way.

    Memory: for each drafter, set and temperature keys, values and features of one prompt.
    """

    def __init__(self, target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig):
        self.target, self.drafters = target, drafters
        lengths: dict[str, list[int]] = {}
        for prompt in prompts:
            lengths.setdefault(prompt.set, []).append(len(encode_chat(target, prompt.turns[0])))
        half_way = {name: np.mean(found) + config.max_new_tokens / 2 for name, found in lengths.items()}
        self.contexts = {name: CONTEXT_STEP * max(1, round(tokens / CONTEXT_STEP)) for name, tokens in half_way.items()}
        self._timers: dict[tuple[str, str, float], StepTimer] = {}

    def run(self, set_name: str, temperature: float) -> None:
        """One round for each drafter."""
        for name in self.drafters:
            self._timer(name, set_name, temperature).run()

    def costs(self, drafter: str, set_name: str, temperature: float) -> StepCosts:
        """Medians of the rounds; of further ones where there were too few."""
        timer = self._timer(drafter, set_name, temperature)
        timer.run_at_least(MIN_ROUNDS)
        return timer.costs(statistics.median)[0]

    def _timer(self, name: str, set_name: str, temperature: float) -> StepTimer:
        key, drafter = (name, set_name, temperature), self.drafters[name]
        if key not in self._timers:
            step = single_steps(self.target, drafter, temperature=temperature, context=self.contexts[set_name])
            self._timers[key] = StepTimer([step], drafter.block_size)
        return self._timers[key]


class BatchTimings(NamedTuple):
    """What decoding several prompts at once took, by drafter, set, temperature and concurrency."""

    speedups: dict[tuple[str, str, float, int], float]
    """Measured decode_speedup: the ratio of all tokens over all seconds."""
    costs: dict[tuple[str, str, float, int], dict[int, StepCosts]]
    """Costs of steps by the number of rows: medians of what was timed between the groups."""


def measure_together(
    target: Target,
    drafters: dict[str, Drafter],
    prompts: Sequence[Prompt],
    config: BenchConfig,
    contexts: Mapping[str, int],
) -> BatchTimings:
    """Decode the first prompts of each set in groups, plainly and with each drafter's whole drafts.

    It checks predictions. What cannot be measured, for memory or because the target cannot decode batches, is said and
    left out, and so is a concurrency that a set has too few prompts for. Only first turns are decoded.

    Args:
        target: decodes batches.
        drafters: by name.
        prompts: those of the benchmark.
        config: its temperatures, lengths and concurrencies.
        contexts: tokens before the steps that are timed, by set.
    """
    encoded: dict[str, list[list[int]]] = {}
    for prompt in prompts:
        encoded.setdefault(prompt.set, []).append(encode_chat(target, prompt.turns[0]))
    sizes = [size for size in config.concurrencies if size > 1]
    groups = {name: {size: groups_of(of_set, size) for size in sizes} for name, of_set in encoded.items()}
    num_groups = sum(len(of_size) for of_set in groups.values() for of_size in of_set.values())
    found = BatchTimings({}, {})
    with progress_bar() as bar:
        total = num_groups * len(config.temperatures)
        task = bar.add_task("decoding several at once", total=total, info="")
        for set_name, temperature in itertools.product(encoded, config.temperatures):
            options: dict[str, Any] = {"temperature": temperature, "context": contexts[set_name]}
            steps = {name: _batch_steps(target, drafter, sizes, options) for name, drafter in drafters.items()}
            for size, of_size in groups[set_name].items():
                bar.update(task, info=escape(printable(f"{set_name}, {size}")))
                timers = {
                    name: StepTimer([of_rows[rows] for rows in of_rows if rows <= size], drafters[name].block_size)
                    for name, of_rows in steps.items()
                    if size in of_rows
                }
                rates: dict[str | None, float] = {}
                try:
                    rates = _rates(target, drafters, of_size, temperature, config, list(timers.values()))
                except (ValueError, torch.OutOfMemoryError) as error:
                    print(
                        printable(f"{size} prompts of {set_name} at once were not measured: {error}"), file=sys.stderr
                    )
                bar.advance(task, len(of_size))
                for name in drafters if rates.get(None) else ():
                    found.speedups[name, set_name, temperature, size] = rates[name] / rates[None]
                for name, timer in timers.items():
                    timer.run_at_least(MIN_ROUNDS)
                    costs = timer.costs(statistics.median)
                    found.costs[name, set_name, temperature, size] = dict(zip(steps[name], costs, strict=False))
    return found


def _batch_steps(
    target: Target, drafter: Drafter, concurrencies: Sequence[int], options: dict
) -> dict[int, Callable[[int], None]]:
    """Steps of 1, 2, 4, ... rows and of each concurrency, as far as they can be had."""
    steps: dict[int, Callable[[int], None]] = {}
    powers = {2**i for i in range(max(concurrencies, default=0).bit_length())}
    for size in sorted(powers | set(concurrencies)):
        try:
            steps[size] = batch_steps(target, drafter, size, **options)
        except (ValueError, torch.OutOfMemoryError) as error:
            print(f"{size} prompts at once are not predicted: {error}", file=sys.stderr)
            break
    return steps


def _rates(
    target: Target,
    drafters: dict[str, Drafter],
    groups: list,
    temperature: float,
    config: BenchConfig,
    timers: Sequence[StepTimer],
) -> dict[str | None, float]:
    """Tokens a second of all groups, plainly (None) and by drafter, from medians of runs of each group."""
    sides: dict[str | None, Drafter | None] = {None: None, **drafters}
    totals = {name: np.zeros(2) for name in sides}
    options: dict[str, Any] = {"temperature": temperature, "seed": config.seed}
    for name in sides if groups else ():  # a warm-up
        generate_batch(target, sides[name], groups[0], max_new_tokens=min(8, config.max_new_tokens), **options)
    for rows in groups:
        runs: dict[str | None, list[tuple[float, int]]] = {name: [] for name in sides}
        for number in range(NUM_REPEATS):
            for name in list(sides) if number % 2 else reversed(sides):
                done = generate_batch(target, sides[name], rows, max_new_tokens=config.max_new_tokens, **options)
                runs[name].append((done[0].decode_seconds, sum(out.num_decode_tokens for out in done)))
            for timer in timers:
                timer.run()
        for name, found in runs.items():
            seconds, tokens = sorted(found)[NUM_REPEATS // 2]
            totals[name] += tokens, seconds
    return {name: float(tokens / seconds) if tokens else 0.0 for name, (tokens, seconds) in totals.items()}


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
