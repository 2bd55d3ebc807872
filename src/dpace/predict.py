"""Accepted lengths and the costs of steps in; decode_speedup at other verify widths and concurrencies out."""

from collections.abc import Sequence

import numpy as np

from dpace.drafter import Drafter
from dpace.metrics import Acceptance
from dpace.pace import StepCosts, measure_costs
from dpace.report import acceptance_of, whole_blocks
from dpace.target import Target

NUM_ROUNDS = 15
"""Times that each step is measured."""


def predict_speedups(acceptance: Acceptance, costs: StepCosts) -> list[float]:
    """decode_speedup over verify widths 2 to `block_size`, for as many prompts at once as the costs were measured with.

    `((sum over a of min(a, width - 1) * share of verifications that accepted a) + 1 - m) / (draft + verify[width]) * verify[1]`, with
    `m` the share of verifications without a bonus token: a draft that is verified up to `width` accepts what it would have
    accepted whole, cut.

    Args:
        acceptance: of whole drafts.
        costs: seconds of steps.
    """
    total = max(1, acceptance.num_verifications)
    speedups = []
    for width in range(2, acceptance.block_size + 1):
        kept = np.minimum(np.arange(acceptance.block_size), width - 1) @ acceptance.counts / total
        seconds = costs.draft_seconds + costs.verify_seconds[width - 1]
        speedups.append(float((kept + 1 - acceptance.num_missing / total) / seconds / costs.plain_rate))
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
        One entry a drafter, set, temperature and concurrency: `widths`, `speedups`, and `measured`, None where that width was not
        measured (or more than one prompt at once).
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
        for concurrency in concurrencies:
            predictions.append(
                {
                    "drafter": row["drafter"],
                    "set": row["set"],
                    "temperature": row["temperature"],
                    "concurrency": concurrency,
                    "widths": widths,
                    "speedups": predict_speedups(acceptance_of(row), costs[row["drafter"], concurrency]),
                    "measured": [measured.get((*key, name)) if concurrency == 1 else None for name in names],
                }
            )
    return predictions
