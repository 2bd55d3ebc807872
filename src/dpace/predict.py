"""Accepted lengths and the costs of steps in; decode_speedup at other verify widths and concurrencies out."""

import itertools
import sys
from collections.abc import Sequence
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


def predict_speedups(row: dict, alone: StepCosts, together: StepCosts) -> list[float]:
    """decode_speedup over verify widths 2 to `block_size`, for one or several prompts at once.

    `emitted(width) * plain / step(width)`, where `emitted` is `tokens_at(width)` less the share of tokens that are missing where a text
    ends with its draft. The seconds `plain` of a token and `step` of a whole draft are those that the benchmark found; only the
    ratios to them, of other widths and of several prompts, come from costs that were measured outside it. One prompt at once with
    whole drafts is thus what was measured.

    Args:
        row: of results.json, measured with whole drafts.
        alone: seconds of steps with one prompt.
        together: with as many prompts as the prediction is for.
    """
    acceptance = acceptance_of(row)
    counts, size, total = acceptance.counts.tolist(), acceptance.block_size, max(1, acceptance.num_verifications)
    plain, ours = (row[side] for side in ("plain_responses", "responses"))
    plain_seconds = sum(r["decode_seconds"] for r in plain) / max(1, sum(r["decode_tokens"] for r in plain))
    plain_seconds *= together.verify_seconds[0] / alone.verify_seconds[0]
    step_seconds = sum(r["decode_seconds"] for r in ours) / total
    step_seconds /= alone.draft_seconds + alone.verify_seconds[size - 1]
    kept = 1 - acceptance.num_missing / max(1e-9, total * tokens_at(size, counts))
    speedups = []
    for width in range(2, size + 1):
        seconds = step_seconds * (together.draft_seconds + together.verify_seconds[width - 1])
        speedups.append(kept * tokens_at(width, counts) * plain_seconds / seconds)
    return speedups


def measure_together(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig
) -> dict[tuple[str, str, float, int], float]:
    """Decode the first turns of the first prompts of each set in groups, plainly and with each drafter's whole drafts.

    It checks predictions, which are for as many rows all the time: here rows that are done leave their group, and those that are left
    go on. What cannot be measured, for memory or because the target cannot decode batches, is said and left out.

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
        rows = encoded[set_name][: max(NUM_TOGETHER, size)]
        groups = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
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
    costs = {
        (name, c): measure_costs(target, drafters[name], c, num_rounds=NUM_ROUNDS)
        for name in drafters
        for c in {1, *concurrencies}
    }
    predictions = []
    for row in whole_blocks(results):
        key = (row["drafter"], row["set"], row["temperature"])
        widths = list(range(2, row["block_size"] + 1))
        alone = costs[row["drafter"], 1]
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
                    "speedups": predict_speedups(row, alone, costs[row["drafter"], concurrency]),
                    "costs": asdict(costs[row["drafter"], concurrency]),
                    "measured": checked,
                }
            )
    return predictions
