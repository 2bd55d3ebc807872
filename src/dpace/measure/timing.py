"""Time decoding steps of one prompt and of several at once."""

import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.markup import escape

from dpace.config import BenchConfig
from dpace.data.chat import encode_chat
from dpace.data.prompts import Prompt
from dpace.decode.batch import batch_steps, generate_batch
from dpace.decode.costs import StepCosts, StepTimer, single_steps
from dpace.drafter import Drafter
from dpace.progress import printable, progress_bar
from dpace.target import Target

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
