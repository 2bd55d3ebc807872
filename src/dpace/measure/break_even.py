"""Find the tau above which drafts pay, for each length of the context and number of requests.

In come responses with a drafter and without one to the same prompts; out come the break-even tau, the measured tau
beside it, and their intervals. A step with a draft takes longer than a plain one. Its seconds over those of a plain
token are the tokens that it has to emit.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import product
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from dpace.measure.records import ResponseRecord, Setup, group_by
from dpace.measure.results import BreakEven, Estimate, PairedResponse, ServerResults, nullable
from dpace.metrics import decode_speedup, estimate

EDGES = (1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens of a prompt at which a range of context lengths ends and the next one begins."""
CONTEXTS = (
    "below 1k",
    *(f"{edge // 1024}k to {edge // 512}k" for edge in EDGES[:-1]),
    "32k and more",
)
"""Names of the ranges."""
TIMES = ("decode_tokens", "decode_seconds")
PAIRED = (*TIMES, "plain_tokens", "plain_seconds")
"""Fields of responses from which speeds follow."""


def context_of(num_tokens: int) -> str:
    """Return the name of the range of context lengths that a prompt of this number of tokens is in."""
    return CONTEXTS[bisect_right(EDGES, num_tokens)]


def prompt_totals(responses: Iterable[PairedResponse | ResponseRecord], *names: str) -> np.ndarray:
    """Sum fields of responses by prompt, "name prompt", in the order of the prompts; nan where one is not known."""
    groups = group_by(responses, attrgetter("id")).values()
    values = [np.array([attrgetter(*names)(response) for response in group], float) for group in groups]
    return np.array([of_prompt.sum(0) for of_prompt in values]).T


def find_break_even(measured: Iterable[tuple[tuple[str, float, int], PairedResponse]]) -> Iterator[BreakEven]:
    """Yield the break-even of each range of context lengths; nothing where verifications or a baseline are not known.

    A response whose verifications are not known is left out.

    A verification takes as long whether its draft is accepted or refused. So the ratio of its seconds to those of a
    plain token is that of the latencies with all drafts refused and without drafts.

    Args:
        measured: responses, each behind the drafter's name, temperature and number of requests at once.

    Source: the method with refused drafts is that of vllm-project/vllm#54691.
    """
    # An answer of one token has no verification, and llama.cpp tells of none where it never drafted.
    decoded = (pair for pair in measured if pair[1].decode_tokens and pair[1].num_verifications)
    in_order = sorted(decoded, key=lambda pair: pair[1].prompt_tokens)
    groups = group_by(in_order, lambda pair: (pair[0], context_of(pair[1].prompt_tokens)))
    for ((drafter, temperature, concurrency), _), pairs in groups.items():
        part = [response for _, response in pairs]
        ours, seconds, plain, plain_seconds, verifications = prompt_totals(part, *PAIRED, "num_verifications")
        break_even = nullable(decode_speedup(plain, plain_seconds, verifications, seconds))
        if break_even[0] is not None:
            yield BreakEven(
                prompt_tokens=part[len(part) // 2].prompt_tokens,
                drafter=drafter,
                temperature=temperature,
                concurrency=concurrency,
                tau=nullable(estimate(np.array([[[ours]], [[verifications]]]))),
                break_even=break_even,
                speedup=nullable(decode_speedup(ours, seconds, plain, plain_seconds)),
            )


class Upgrade(NamedTuple):
    """A server's row against that of another one."""

    set: str
    temperature: float
    concurrency: int
    prefix: str
    tau_gain: Estimate
    """Ratio of the taus minus 1; None where one of them does not report verifications."""
    speed_ratio: Estimate


def compare_servers(before: ServerResults, after: ServerResults) -> list[Upgrade]:
    """Compare the rows that two servers have in common, on the prompts that both were asked.

    There are none where they serve other targets, or were asked in another way.
    """
    if any(getattr(before, field.name) != getattr(after, field.name) for field in fields(Setup)):
        return []
    setting = attrgetter("set", "temperature", "concurrency", "prefix")
    upgrades = []
    for old, new in product(before.rows, after.rows):
        sides = [row.responses or () for row in (new, old)]
        common = set.intersection(*({(response.id, response.prompt_tokens) for response in side} for side in sides))
        if setting(old) == setting(new) and common:
            kept = (
                sorted((r for r in side if (r.id, r.prompt_tokens) in common), key=attrgetter("id")) for side in sides
            )
            ours, theirs = (prompt_totals(side, "num_emitted", "num_verifications", *TIMES) for side in kept)
            gain = nullable(ratio - 1 for ratio in decode_speedup(*ours[:2], *theirs[:2]))
            upgrades.append(Upgrade(*setting(new), gain, nullable(decode_speedup(*ours[2:], *theirs[2:]))))
    return upgrades
