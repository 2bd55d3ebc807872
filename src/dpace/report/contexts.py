"""Sort acceptance by category and by length of the context, with thinking on and off side by side."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dpace.measure.results import BenchResults
from dpace.measure.rows import ResponseRecord, acceptance_of, interval_of
from dpace.report.cells import Column, with_interval

EDGES = (1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens of a prompt at which a bin of context lengths ends and the next one begins."""


@dataclass(frozen=True)
class Part:
    """The responses of one drafter to the prompts of one category, or of one range of lengths."""

    name: str
    drafter: str
    temperature: float
    block_size: int
    responses: dict[bool, list[ResponseRecord]] = field(default_factory=dict)
    """By whether thinking was on."""

    @property
    def num_prompts(self) -> int:
        """Number of different prompts."""
        return len({response.id for found in self.responses.values() for response in found})

    def tau(self, thinking: bool) -> str:
        """Write tau and its interval; `-` where nothing was measured."""
        found = self.responses.get(thinking, [])
        if not found:
            return "-"
        acceptance = acceptance_of(found, self.block_size)
        is_several = len({response.id for response in found}) > 1
        ends = interval_of(acceptance.interval()) if is_several else (None, None)
        return with_interval(acceptance.tau if acceptance.counts.sum() else None, ends)


def context_bin(num_tokens: int) -> str:
    """Name the range of context lengths that a prompt belongs to.

    Args:
        num_tokens: of the prompt, earlier turns included.
    """
    place = bisect_right(EDGES, num_tokens)
    names = [f"{edge // 1024}k" for edge in EDGES]
    if place == 0:
        return f"context below {names[0]}"
    return f"context {names[place - 1]} to {names[place]}" if place < len(EDGES) else f"context {names[-1]} and more"


def find_parts(benchmarks: Iterable[BenchResults]) -> list[Part]:
    """Sort the responses with whole drafts of benchmarks by category, then by length of the context.

    Responses of the same drafter (by its weights) to the same target stand in one row, also from several benchmarks.
    """
    parts: dict[tuple, Part] = {}
    order = [f"context below {EDGES[0] // 1024}k", *map(context_bin, EDGES)]
    for results in benchmarks:
        for row in results.whole_blocks:
            who = results.target, results.drafters.get(row.drafter, row.drafter), row.temperature, row.block_size
            for response in row.responses:
                for name in (row.set, context_bin(response.prompt_tokens)):
                    made = Part(name, row.drafter, row.temperature, row.block_size)
                    part = parts.setdefault((name, *who), made)
                    part.responses.setdefault(bool(results.thinking), []).append(response)
    found = list(parts.values())
    categories = [part for part in found if part.name not in order]
    return categories + sorted((p for p in found if p.name in order), key=lambda p: order.index(p.name))


def says_more(benchmarks: Sequence[BenchResults]) -> bool:
    """Whether the table says more than that of the sets: of categories, long contexts, or thinking."""
    rows = [row for results in benchmarks for row in results.rows]
    is_long = any(response.prompt_tokens >= EDGES[0] for row in rows for response in row.responses)
    return is_long or any("/" in row.set for row in rows) or len({bool(r.thinking) for r in benchmarks}) > 1


CONTEXT_COLUMNS = (
    Column("category", lambda part: part.name, is_text=True),
    Column("T", lambda part: f"{part.temperature:g}"),
    Column("drafter", lambda part: part.drafter, is_text=True),
    Column("prompts", lambda part: str(part.num_prompts)),
    Column("tau, thinking off", lambda part: part.tau(False)),
    Column("tau, thinking on", lambda part: part.tau(True)),
)
"""What is written of a `Part`."""
