"""Pool finished responses into the rows of results.json.

In come records of single responses, or the acceptance of held-out answers by seed; out come rows with tau, speed and
their intervals, and comparisons of drafters.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from operator import attrgetter
from typing import Any

import numpy as np

from dpace.config import BenchConfig
from dpace.measure.records import COMPILED, PLAIN, ResponseRecord, acceptance_of, group_by, tokens_per_second
from dpace.measure.results import (
    ComparedRow,
    Comparison,
    CompiledBaseline,
    Estimate,
    Published,
    Row,
    defined,
    nullable,
)
from dpace.metrics import Acceptance, decode_speedup, published_speedup, published_tau, tau_estimate, tau_gain
from dpace.prompts.prompts import Prompt

TIMES = attrgetter("decode_seconds", "decode_tokens")
"""What the speed of a response follows from."""


def make_rows(
    records: Mapping[tuple, ResponseRecord], prompts: Sequence[Prompt], config: BenchConfig, drafters: Iterable[str]
) -> list[Row]:
    """Pool records into one row for each temperature, set, drafter and width.

    Args:
        records: by `ResponseRecord.key`, of `PLAIN` and every drafter, and maybe of `COMPILED`.
        prompts: of the rows.
        config: temperatures and widths.
        drafters: their names.
    """
    rows = []
    groups = group_by(prompts, attrgetter("set"))
    for temperature, set_name in sorted(product(config.temperatures, groups)):
        places = [(temperature, prompt.id, turn) for prompt in groups[set_name] for turn in range(len(prompt.turns))]
        plain = [records[*place, PLAIN, None] for place in places]
        compiled = [records[*place, COMPILED, None] for place in places if (*place, COMPILED, None) in records]
        for name, width in product(drafters, config.widths):
            ours = [records[*place, name, width] for place in places]
            row = _pool_responses(
                ours, plain, compiled, set=set_name, temperature=temperature, drafter=name, width=width
            )
            rows.append(row)
    return rows


def _pool_responses(
    ours: list[ResponseRecord], plain: list[ResponseRecord], compiled: list[ResponseRecord], **way: Any
) -> Row:
    """Make the row of a drafter; steps of plain decoding may have been compiled for all responses, or not."""
    acceptance = acceptance_of(ours)
    speedup = _speedup_over(ours, plain)
    published = Published(
        tau=defined(published_tau([r.accepted_lengths for r in ours])),
        decode_speedup=defined(published_speedup(map(TIMES, ours), map(TIMES, plain))),
    )
    return Row(
        **way,
        num_responses=len(ours),
        **_drafted([acceptance]),
        num_without_bonus=acceptance.total_without_bonus,
        share_copied=sum(r.num_copied for r in ours) / max(1, sum(r.decode_tokens for r in ours)),
        tokens_per_second=tokens_per_second(ours),
        plain_tokens_per_second=tokens_per_second(plain),
        decode_speedup=speedup[0],
        decode_speedup_interval=speedup[1:],
        published=published,
        num_same_text=sum(r.same_text for r in ours),
        responses=ours,
        plain_responses=plain,
        compiled=_compiled_baseline(ours, compiled) if len(compiled) == len(plain) else None,
    )


def _drafted(seeds: Sequence[Acceptance]) -> dict[str, Any]:
    """Return what a `DraftedRow` says of the same prompts with one seed or several."""
    pooled = Acceptance.pooled(seeds)
    tau = nullable(tau_estimate([seeds]))
    return {
        "block_size": pooled.block_size,
        "histogram": pooled.counts.tolist(),
        "tau": tau[0],
        "tau_interval": tau[1:],
        "reach_rate": pooled.reach_rate.tolist(),
    }


def _compiled_baseline(ours: list[ResponseRecord], compiled: list[ResponseRecord]) -> CompiledBaseline:
    speedup = _speedup_over(ours, compiled)
    return CompiledBaseline(
        tokens_per_second=tokens_per_second(compiled),
        decode_speedup=speedup[0],
        decode_speedup_interval=speedup[1:],
        num_same_text=sum(r.same_text for r in compiled),
    )


def _speedup_over(ours: Sequence[ResponseRecord], theirs: Sequence[ResponseRecord]) -> Estimate:
    return nullable(decode_speedup(_prompt_times(ours), _prompt_times(theirs)))


def _prompt_times(responses: Sequence[ResponseRecord]) -> np.ndarray:
    """Sum seconds and tokens of each prompt, "prompt 2", in the order of the prompts."""
    groups = group_by(responses, attrgetter("id")).values()
    return np.array([np.sum([TIMES(response) for response in group], 0) for group in groups])


def compare_drafters(rows: Sequence[Row]) -> Iterator[Comparison]:
    """Compare every drafter with the first on the same prompts: gain of tau, ratio of tokens a second."""
    first = {(row.set, row.temperature, row.width): row for row in reversed(rows)}
    for row in rows:
        base = first[row.set, row.temperature, row.width]
        if base is not row:
            yield Comparison(
                set=row.set,
                temperature=row.temperature,
                width=row.width,
                drafter=row.drafter,
                baseline=base.drafter,
                tau_gain=nullable(tau_gain([row.acceptance], [base.acceptance])),
                speed_ratio=_speedup_over(row.responses, base.responses),
            )


def pool_seeds(ours: Sequence[Acceptance], theirs: Sequence[Acceptance], **facts: Any) -> ComparedRow:
    """Pool the seeds of one objective, beside those of the baseline.

    Args:
        ours: held-out acceptance of each seed.
        theirs: the baseline's, for the same seeds and prompts.
        facts: what else the row has: names, temperature, prompts and costs.
    """
    return ComparedRow(
        **facts,
        **_drafted(ours),
        tau_by_seed=[defined(one.tau) for one in ours],
        gain=nullable(tau_gain(ours, theirs)),
        gain_by_seed=[defined(one.tau / base.tau - 1) for one, base in zip(ours, theirs, strict=True)],
    )
