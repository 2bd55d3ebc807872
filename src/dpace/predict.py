"""Accepted lengths and the costs of steps in; decode_speedup at other verify widths and concurrencies out."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from dpace.batch import generate_batch
from dpace.config import BenchConfig
from dpace.drafter import Drafter
from dpace.pace import StepCosts, measure_costs
from dpace.progress import progress_bar
from dpace.prompts import Prompt
from dpace.report import acceptance_of, whole_blocks
from dpace.responses import encode_chat
from dpace.target import Target

NUM_ROUNDS = 15
"""Times that each step is measured."""
CONTEXT_STEP = 64
"""Contexts, in tokens, that steps are measured with are multiples of it."""
NUM_TOGETHER = 16
"""Prompts of a set, at most, that are decoded several at once."""


def tokens_at(width: int, counts: Sequence[int]) -> float:
    """Tokens that a verification emits if it reads only `width` tokens, from the accepted lengths of whole drafts.

    A narrow verification often begins the next block inside a run of tokens that the whole draft had right. The new draft is taken
    to be right up to where that run ended, and wrong there; where the run ended with its block, it may go on as runs do that are
    as long. On the demo's drafter that was within 1.5 % of tau at widths 2, 4 and 6; cutting whole drafts (`E[min(accepted, width - 1)]`)
    was up to 7 % too low, as it forgets that long runs take several narrow verifications.

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
        """Expected tokens and verifications of a block whose first draft tokens are right, and of the blocks in its run."""
        shares = np.where(emitted > at_least, counts, 0) / max(1, sum(counts[at_least:]))
        ended = (runs * shares)[:, :last].sum(-1)
        if width == last + 1:
            return ended + shares[last] * runs[:, last]
        if at_least == last - width:  # where the next block of an open run begins again and again
            return (ended + shares[last] * np.array([width, 1])) / max(1e-9, 1 - shares[last])
        return ended + shares[last] * (np.array([width, 1]) + until_wrong(last - width))

    tokens, verifications = until_wrong(0)
    return float(tokens / max(1e-9, verifications))


def predict_speedups(row: dict, costs: Mapping[int, StepCosts], concurrency: int = 1) -> list[float]:
    """decode_speedup over verify widths 2 to `block_size`, for one or several prompts at once.

    The responses of the benchmark are put in groups as `measure_together` does, each with its own number of tokens and of verifications;
    at other widths these are as many times more as `tokens_at` is smaller. Rows that are done leave their group, and a step costs what
    it costs for those that are left. The seconds of a token and of a step with a whole draft are those that the benchmark found; only
    the ratios to them, of other widths and of several prompts, come from costs that were measured outside it. One prompt at once with
    whole drafts is thus what was measured.

    Args:
        row: of results.json, measured with whole drafts.
        costs: seconds of steps by the number of rows, 1 among them; in between they are interpolated.
        concurrency: prompts at once. Where there are fewer responses, they are taken again.
    """
    alone, plain, ours = costs[1], row["plain_responses"], row["responses"]
    if concurrency == 1:
        groups = [[i] for i in range(len(ours))]
    else:
        first_turns = [i for i, r in enumerate(ours) if r["turn"] == 0]
        groups = groups_of(first_turns * -(-concurrency // len(first_turns)), concurrency)
    tokens, our_tokens = ([r["decode_tokens"] for r in side] for side in (plain, ours))
    verifications = [sum(r["histogram"]) for r in ours]
    plain_costs = {rows: cost.verify_seconds[0] for rows, cost in costs.items()}
    plain_slowness = _seconds(plain) / max(1e-9, sum(tokens) * plain_costs[1])
    plain_rate = _rate(tokens, tokens, groups, plain_costs) / plain_slowness
    slowness = _seconds(ours) / max(1e-9, sum(verifications) * (alone.draft_seconds + alone.verify_seconds[-1]))
    counts, speedups = acceptance_of(row).counts.tolist(), []
    for width in range(2, len(counts) + 1):
        stretch = tokens_at(len(counts), counts) / max(1e-9, tokens_at(width, counts))
        steps = [stretch * count for count in verifications]
        step_costs = {rows: cost.draft_seconds + cost.verify_seconds[width - 1] for rows, cost in costs.items()}
        rate = _rate(our_tokens, steps, groups, step_costs) / max(1e-9, slowness)
        speedups.append(rate / max(1e-9, plain_rate))
    return speedups


def _seconds(responses: Sequence[dict]) -> float:
    return sum(r["decode_seconds"] for r in responses)


def _rate(
    tokens: Sequence[int], steps: Sequence[float | int], groups: Sequence[Sequence[int]], costs: Mapping[int, float]
) -> float:
    """Tokens a second of groups of responses that take so many steps each, of seconds by the number of rows that are left."""
    sizes, seconds = sorted(costs), 0.0
    for group in groups:
        done = 0.0
        for left, count in zip(range(len(group), 0, -1), sorted(steps[i] for i in group), strict=True):
            seconds += (count - done) * float(np.interp(left, sizes, [costs[size] for size in sizes]))
            done = count
    return sum(tokens[i] for group in groups for i in group) / max(1e-9, seconds)


def groups_of(items: list, size: int) -> list[list]:
    """The first `NUM_TOGETHER` items in groups of a size, or one larger group; items that fill no group are left out."""
    items = items[: max(NUM_TOGETHER, size)]
    return [items[start : start + size] for start in range(0, len(items) - size + 1, size)]


def measure_together(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig
) -> dict[tuple[str, str, float, int], float]:
    """Decode the first turns of the first prompts of each set in groups, plainly and with each drafter's whole drafts.

    It checks predictions. What cannot be measured, for memory or because the target cannot decode batches, is said and left out.

    Args:
        target: decodes batches.
        drafters: by name.
        prompts: those of the benchmark.
        config: its temperatures, lengths and concurrencies.

    Returns:
        decode_speedup by drafter, set, temperature and concurrency: the ratio of all tokens over all seconds, in an order that is
        reversed from group to group. Nothing for a concurrency that a set has too few prompts for.
    """
    encoded: dict[str, list[list[int]]] = {}
    for prompt in prompts:
        encoded.setdefault(prompt.set, []).append(encode_chat(target, prompt.turns[0]))
    jobs = {}
    for set_name, temperature, size in itertools.product(encoded, config.temperatures, config.concurrencies):
        groups = groups_of(encoded[set_name], size)
        if size > 1 and groups:
            jobs[set_name, temperature, size] = groups
    found = {}
    with progress_bar() as bar:
        task = bar.add_task("decoding several at once", total=sum(map(len, jobs.values())), info="")
        for (set_name, temperature, size), groups in jobs.items():
            bar.update(task, info=f"{set_name}, {size}")
            try:
                rates = _rates(target, drafters, groups, temperature, config, lambda: bar.advance(task))
            except (ValueError, torch.OutOfMemoryError) as error:
                print(f"{size} prompts of {set_name} at once were not measured: {error}", file=sys.stderr)
                continue
            if rates[None]:
                found |= {(name, set_name, temperature, size): rates[name] / rates[None] for name in drafters}
    return found


def _rates(
    target: Target, drafters: dict[str, Drafter], groups: list, temperature: float, config: BenchConfig, advance
) -> dict[str | None, float]:
    """Tokens a second of all groups, without a drafter (None) and with each; the first call of a side is not counted."""
    sides: dict[str | None, Drafter | None] = {None: None, **drafters}
    totals = {name: np.zeros(2) for name in sides}
    options: dict[str, Any] = {"temperature": temperature, "seed": config.seed}
    for number, rows in enumerate(groups):
        for name in list(sides) if number % 2 else reversed(sides):
            if not number:
                generate_batch(target, sides[name], rows, max_new_tokens=min(8, config.max_new_tokens), **options)
            done = generate_batch(target, sides[name], rows, max_new_tokens=config.max_new_tokens, **options)
            totals[name] += sum(out.num_decode_tokens for out in done), done[0].decode_seconds
        advance()
    return {name: float(tokens / seconds) if tokens else 0.0 for name, (tokens, seconds) in totals.items()}


def predict(
    results: dict, target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig
) -> list[dict]:
    """Predict every row of a benchmark that was measured with whole drafts, and with `config.predict` check it for several prompts.

    Memory: keys and values of as many prompts as the largest concurrency.

    Args:
        results: of `dpace.benchmark.bench`.
        target: measured here with batches.
        drafters: by name.
        prompts: of the benchmark.
        config: without `predict`, predictions are for one prompt at a time only.

    Returns:
        One entry a drafter, set, temperature and concurrency: `widths`, `speedups`, `costs`, and `measured`, None where that width
        was not measured.
    """
    measured = {(r["drafter"], r["set"], r["temperature"], r["width"]): r["decode_speedup"] for r in results["rows"]}
    together = measure_together(target, drafters, prompts, config) if config.predict else {}
    concurrencies = config.concurrencies if config.predict else (1,)
    sizes = {2**i for i in range(max(concurrencies).bit_length())} | set(concurrencies)
    rows, predictions = whole_blocks(results), []
    costs_of = _measure_steps(target, drafters, rows, sorted(sizes))
    for row, costs in zip(rows, costs_of, strict=True):
        key = (row["drafter"], row["set"], row["temperature"])
        widths = list(range(2, row["block_size"] + 1))
        for concurrency in concurrencies:
            if concurrency == 1:
                checked = [measured.get((*key, width)) for width in [*widths[:-1], "full"]]
            else:
                checked = [None] * (len(widths) - 1) + [together.get((*key, concurrency))]
            predictions.append(
                {
                    "drafter": row["drafter"],
                    "set": row["set"],
                    "temperature": row["temperature"],
                    "concurrency": concurrency,
                    "widths": widths,
                    "speedups": predict_speedups(row, costs, concurrency),
                    "costs": asdict(costs[concurrency]),
                    "measured": checked,
                }
            )
    return predictions


def _measure_steps(
    target: Target, drafters: dict[str, Drafter], rows: Sequence[dict], sizes: Sequence[int]
) -> list[dict[int, StepCosts]]:
    """For each row of results, what steps of so many prompts cost with a context as long as its responses have half way."""
    found = []
    with progress_bar() as bar:
        task = bar.add_task("measuring steps", total=len(rows) * len(sizes), info="")
        for row in rows:
            lengths = [r["prompt_tokens"] + r["decode_tokens"] / 2 for r in row["responses"]]
            context = CONTEXT_STEP * max(1, round(float(np.mean(lengths)) / CONTEXT_STEP))
            found.append({})
            for size in sizes:
                drafter = drafters[row["drafter"]]
                found[-1][size] = measure_costs(target, drafter, size, num_rounds=NUM_ROUNDS, context=context)
                bar.update(task, advance=1, info=f"{row['set']}, {size} at once")
    return found
