"""Write cells of results, with intervals and verdicts: the columns that tables and pages share.

Say in a sentence what a user gets from a measured drafter, and what to do where that is nothing.

Sort acceptance by category and by length of the context, with thinking on and off side by side.

Put text that others wrote into Markdown and into a line, so that it is shown as it is.
"""

import html
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dpace.measure.results import (
    BenchResults,
    ComparedRow,
    Comparison,
    Estimate,
    Interval,
    ResponseRecord,
    Row,
    ServerRow,
    acceptance_of,
    nullable,
)
from dpace.system.progress import printable

Verdict = Literal["faster", "slower", "no clear difference", "too few prompts"]


class Column(NamedTuple):
    """A column of a table: its heading, and what it writes of a row."""

    heading: str
    write: Callable[[Any], str]
    is_text: bool = False
    shown: Literal["always", "narrow", "wide"] = "always"
    """In which tables: those of 80 columns, or those of `--wide` and of the page."""


def chosen(columns: Iterable[Column], wide: bool) -> list[Column]:
    """Choose the columns of a narrow or a wide table."""
    left_out = "narrow" if wide else "wide"
    return [column for column in columns if column.shown != left_out]


def rows_of(columns: Iterable[Column], rows: Iterable[Any]) -> list[list[str]]:
    """Write the headings and the rows of the wide table, for a page."""
    kept = chosen(columns, wide=True)
    return [[column.heading for column in kept], *([column.write(row) for column in kept] for row in rows)]


def with_interval(value: float | None, interval: Interval = (None, None)) -> str:
    """Write `1.23 [1.20, 1.26]`, the number alone where it has no interval, or `-` for none."""
    low, high = interval
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def percent(gain: Estimate) -> str:
    """Write a gain and the ends of its interval, `+5.6 % [+3.1, +8.3]`, or `-` where there is none."""
    value, low, high = gain
    if value is None:
        return "-"
    ends = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * value:+.1f} %{ends}"


def verdict(speedup_interval: Interval) -> Verdict:
    """Say whether a drafter makes decoding faster, from the interval of its decode_speedup."""
    low, high = speedup_interval
    if low is None or high is None:
        return "too few prompts"
    return "faster" if low > 1 else "slower" if high < 1 else "no clear difference"


def objective_verdict(row: ComparedRow, baseline: str) -> str:
    """Say whether an objective drafts better than the baseline, from the interval of its gain."""
    if row.drafter == baseline:
        return "baseline"
    _, low, high = row.gain
    if low is None or high is None:
        return "too few prompts"
    return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def copied_note(rows: Sequence[Row], start: str) -> str:
    """Say how many tokens of each set prompt lookup copied with width `auto`; empty where it copied none."""
    shares = {(row.set, row.temperature): row.share_copied for row in rows if row.width == "auto"}
    if not any(shares.values()):
        return ""
    listed = ", ".join(f"{name} {share:.0%} at T={temperature:g}" for (name, temperature), share in shares.items())
    return f"{start}with width auto, tokens copied from the text before them (prompt lookup): {listed}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


_SET = Column("set", lambda row: row.set, is_text=True)
_T = Column("T", lambda row: f"{row.temperature:g}")
_DRAFTER = Column("drafter", lambda row: row.drafter, is_text=True)
_WIDTH = Column("width", lambda row: str(row.width), is_text=True)
_SPEEDUP = Column("decode_speedup [95 %]", lambda row: with_interval(row.decode_speedup, row.decode_speedup_interval))
_RATE = Column("tok/s", lambda row: f"{row.tokens_per_second:.1f}")
_PLAIN = Column("plain tok/s", lambda row: _rate(row.plain_tokens_per_second), shown="wide")

_COMPILED_COLUMNS = (
    Column("compiled plain tok/s", lambda row: _rate(row.compiled and row.compiled.tokens_per_second), shown="wide"),
    Column("over compiled plain [95 %]", lambda row: _over_compiled(row), shown="wide"),
)
"""What is written of a `CompiledBaseline`."""


def _over_compiled(row: Row) -> str:
    found = row.compiled
    return "-" if found is None else with_interval(found.decode_speedup, found.decode_speedup_interval)


RESULT_COLUMNS = (
    Column("verdict", lambda row: verdict(row.decode_speedup_interval), is_text=True),
    _SET,
    _T,
    _DRAFTER,
    _WIDTH,
    _SPEEDUP,
    Column("tau", lambda row: with_interval(row.tau), shown="narrow"),
    Column("tau [95 %]", lambda row: with_interval(row.tau, row.tau_interval), shown="wide"),
    _RATE,
    _PLAIN,
    Column("tau*", lambda row: with_interval(row.published.tau), shown="wide"),
    Column("speedup*", lambda row: with_interval(row.published.decode_speedup), shown="wide"),
    Column("same text", lambda row: f"{row.num_same_text}/{row.num_responses}"),
)
"""What is written of a `Row`; a star marks what published tables have, see `dpace.metrics.published_tau`."""


def result_columns(rows: Iterable[Row]) -> tuple[Column, ...]:
    """Give the columns of these rows: with compiled plain decoding where that was measured."""
    return (*RESULT_COLUMNS, *_COMPILED_COLUMNS) if any(row.compiled for row in rows) else RESULT_COLUMNS


def compiled_note(rows: Sequence[Row]) -> str:
    """Compare the fastest way on each set with compiled plain decoding; empty where it was not measured."""
    best: dict[tuple[str, float], float] = {}
    for row in rows:
        if row.compiled and row.compiled.decode_speedup is not None:
            key = row.set, row.temperature
            best[key] = max(best.get(key, 0.0), row.compiled.decode_speedup)
    listed = ", ".join(f"{name} {speedup:.2f} at T={temperature:g}" for (name, temperature), speedup in best.items())
    return f"over plain decoding with compiled steps, the fastest way each: {listed}" if listed else ""


def _ratio_verdict(row: Comparison) -> str:
    return verdict(row.speed_ratio[1:])


PAIR_COLUMNS = (
    Column("verdict", _ratio_verdict, is_text=True),
    _SET,
    _T,
    _DRAFTER,
    _WIDTH,
    Column("tau [95 %]", lambda row: percent(row.tau_gain)),
    Column("speed ratio", lambda row: with_interval(row.speed_ratio[0]), shown="narrow"),
    Column("speed ratio [95 %]", lambda row: with_interval(row.speed_ratio[0], row.speed_ratio[1:]), shown="wide"),
)
"""What is written of a `Comparison`."""

SERVER_COLUMNS = (
    Column("verdict", lambda row: _server_verdict(row), is_text=True),
    _SET,
    _T,
    Column("at once", lambda row: str(row.concurrency)),
    _SPEEDUP,
    Column("tau", lambda row: "-" if row.tau is None else with_interval(row.tau), shown="narrow"),
    Column(
        "tau [95 %]",
        lambda row: "not told" if row.tau is None else with_interval(row.tau, row.tau_interval),
        shown="wide",
    ),
    _RATE,
    _PLAIN,
    Column("throughput", lambda row: f"{row.throughput:.1f}", shown="wide"),
    Column("plain throughput", lambda row: _rate(row.plain_throughput), shown="wide"),
    Column("TTFT s (95 %)", lambda row: "{:.2f} ({:.2f})".format(*row.first_seconds), shown="wide"),
    Column("same text", lambda row: "-" if row.num_same_text is None else f"{row.num_same_text}/{row.num_responses}"),
)
"""What is written of a `ServerRow`."""


def _server_verdict(row: ServerRow) -> str:
    return verdict(row.decode_speedup_interval) if row.num_same_text is not None else "no baseline"


def compared_columns(baseline: str, speeds: dict[tuple[str, str], Row]) -> list[Column]:
    """Make the columns of `dpace compare`.

    Args:
        baseline: the objective that the others are compared with.
        speeds: rows of decoding by set and objective; what has none is written as `-`.
    """

    def speedup(row: ComparedRow) -> str:
        speed = speeds.get((row.set, row.drafter))
        return with_interval(speed.decode_speedup, speed.decode_speedup_interval) if speed else "-"

    def gain(row: ComparedRow) -> str:
        return "-" if row.drafter == baseline else percent(row.gain)

    def by_seed(row: ComparedRow) -> str:
        gains = ("-" if value is None else f"{100 * value:+.1f}" for value in row.gain_by_seed)
        return "-" if row.drafter == baseline else " ".join(gains)

    return [
        Column("verdict", lambda row: objective_verdict(row, baseline), is_text=True),
        _SET,
        Column("objective", lambda row: row.drafter, is_text=True),
        Column("tau", lambda row: with_interval(row.tau), shown="narrow"),
        Column("tau [95 %]", lambda row: with_interval(row.tau, row.tau_interval), shown="wide"),
        Column(f"over {baseline} [95 %]", gain),
        Column("by seed", by_seed, shown="wide"),
        Column("decode_speedup [95 %]", speedup, shown="wide"),
        Column("ms/step", lambda row: "-" if row.step_seconds is None else f"{1000 * row.step_seconds:.0f}"),
        Column(
            "peak GiB",
            lambda row: "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}",
            shown="wide",
        ),
    ]


def faster_sets(results: BenchResults) -> list[str]:
    """Name the sets where some drafter, width or temperature is faster than plain decoding."""
    return list(dict.fromkeys(r.set for r in results.rows if verdict(r.decode_speedup_interval) == "faster"))


def advice(results: BenchResults) -> str:
    """Say on which sets decoding is faster; where that is none, say so and what can be done."""
    names, faster = list(dict.fromkeys(row.set for row in results.rows)), faster_sets(results)
    others = [name for name in names if name not in faster]
    if faster:
        rest = f", but not on {' and '.join(others)}: decode that without the drafter" if others else ""
        return f"faster than plain decoding on {' and '.join(faster)}{rest}"
    found = {verdict(row.decode_speedup_interval) for row in results.rows}
    if found <= {"slower"}:
        start = "nothing here is faster than plain decoding: decode without this drafter, or"
    else:
        start = "nothing here is clearly faster than plain decoding: measure more prompts, or"
    return f"{start} train longer or on more prompts (docs/train.md)"


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
        ends = nullable(acceptance.interval()) if is_several else (None, None)
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


def one_line(text: str) -> str:
    """Write a text without line ends and control characters."""
    return printable(" ".join(text.split()))


def as_markdown(text: str) -> str:
    """Escape what Markdown and HTML would read in a text, in one line."""
    text = html.escape(one_line(text).replace("\\", "\\\\"), quote=False)
    for mark in ("`", "|", "*", "~"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("](", "]\\(").replace("![", "!\\[")


def as_code(text: str) -> str:
    """Write a text that stands between backticks, also in a table."""
    return one_line(text).replace("`", "'").replace("|", "\u00a6").replace("<", "\u2039")
