"""Accepted lengths and the costs of steps in; decode_speedup at other verify widths and concurrencies out."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from dpace.drafter import Drafter
from dpace.pace import StepCosts, measure_costs
from dpace.report import acceptance_of, whole_blocks
from dpace.target import Target

NUM_ROUNDS = 15
"""Times that each step is measured."""


def predict_speedups(row: dict, alone: StepCosts, together: StepCosts) -> list[float]:
    """decode_speedup over verify widths 2 to `block_size`, for one or several prompts at once.

    `emitted(width) * plain / step(width)`, where `emitted` is `E[min(accepted, width - 1)] + 1 - m` with `m` the share of
    verifications without a bonus token: a draft that is verified up to `width` accepts what it would have accepted whole, cut. The
    seconds `plain` of a token and `step` of a whole draft are those that the benchmark found; only the ratios to them, of other widths and
    of several prompts, come from costs that were measured outside it. One prompt at once with whole drafts is thus what was measured.

    Args:
        row: of results.json, measured with whole drafts.
        alone: seconds of steps with one prompt.
        together: with as many prompts as the prediction is for.
    """
    acceptance = acceptance_of(row)
    total = max(1, acceptance.num_verifications)
    plain, ours = (row[side] for side in ("plain_responses", "responses"))
    plain_seconds = sum(r["decode_seconds"] for r in plain) / max(1, sum(r["decode_tokens"] for r in plain))
    plain_seconds *= together.verify_seconds[0] / alone.verify_seconds[0]
    step_seconds = sum(r["decode_seconds"] for r in ours) / total
    step_seconds /= alone.draft_seconds + alone.verify_seconds[acceptance.block_size - 1]
    speedups = []
    for width in range(2, acceptance.block_size + 1):
        kept = np.minimum(np.arange(acceptance.block_size), width - 1) @ acceptance.counts / total
        seconds = step_seconds * (together.draft_seconds + together.verify_seconds[width - 1])
        speedups.append(float((kept + 1 - acceptance.num_missing / total) * plain_seconds / seconds))
    return speedups


def predict(results: dict, target: Target, drafters: dict[str, Drafter], concurrencies: Sequence[int]) -> list[dict]:
    """Predict every row of a benchmark that was measured with whole drafts.

    Memory: keys and values of some 150 tokens for each prompt of the largest concurrency.

    Args:
        results: of `dpace.benchmark.bench`.
        target: measured here with batches.
        drafters: by name.
        concurrencies: prompts that are decoded at once.

    Returns:
        One entry a drafter, set, temperature and concurrency: `widths`, `speedups`, `costs`, and `measured`, None where that width
        was not measured (or more than one prompt at once).
    """
    measured = {(r["drafter"], r["set"], r["temperature"], r["width"]): r["decode_speedup"] for r in results["rows"]}
    costs = {
        (name, c): measure_costs(target, drafters[name], c, num_rounds=NUM_ROUNDS)
        for name in drafters
        for c in concurrencies
    }
    predictions = []
    for row in whole_blocks(results):
        key = (row["drafter"], row["set"], row["temperature"])
        widths = list(range(2, row["block_size"] + 1))
        names = [*widths[:-1], "full"]
        alone = costs[row["drafter"], 1]
        for concurrency in concurrencies:
            predictions.append(
                {
                    "drafter": row["drafter"],
                    "set": row["set"],
                    "temperature": row["temperature"],
                    "concurrency": concurrency,
                    "widths": widths,
                    "speedups": predict_speedups(row, alone, costs[row["drafter"], concurrency]),
                    "costs": asdict(costs[row["drafter"], concurrency]),
                    "measured": [measured.get((*key, name)) if concurrency == 1 else None for name in names],
                }
            )
    return predictions
