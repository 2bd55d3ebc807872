"""Columns and cells that the terminal's tables, the page and the model card share.

In come rows of results; out come texts: numbers with their intervals, verdicts, a sentence of advice, and names that
are shown as they are in Markdown and in one line.
"""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from dpace.measure.results import (
    BenchResults,
    ComparedRow,
    Estimate,
    Interval,
    Row,
    ServerRow,
)
from dpace.system.progress import one_line


class Column(NamedTuple):
    """A column of a table: its heading, and what it writes of a row."""

    heading: str
    write: Callable[[Any], str]
    only: Literal["terminal", "page"] | None = None
    """Where it stands: the terminal's tables have 80 characters, and the page has all columns; None for both."""


class Section(NamedTuple):
    """A heading, what to read from it, and a table or figures."""

    title: str
    text: str
    columns: Sequence[Column] = ()
    items: Sequence[Any] = ()
    """What the columns write, a row each."""
    note: str = ""
    """Stands below the table."""
    figures: Sequence[str] = ()
    """Panels as SVG, all of one size."""

    @property
    def rows(self) -> list[list[str]]:
        """Headings and rows of the page's table; empty without one."""
        kept = [column for column in self.columns if column.only != "terminal"]
        rows = [[column.heading for column in kept], *([column.write(item) for column in kept] for item in self.items)]
        return rows if kept else []


def with_interval(
    value: float | None, low: float | None = None, high: float | None = None, form: str = ".2f", unit: str = ""
) -> str:
    """Write `1.23 [1.20, 1.26]`, the number alone where it has no interval, or `-` for none."""
    if value is None:
        return "-"
    number = f"{value:{form}}{unit}"
    return number if low is None or high is None else f"{number} [{low:{form}}, {high:{form}}]"


def percent(gain: Estimate) -> str:
    """Write a gain and the ends of its interval, `+5.6 % [+3.1, +8.3]`, or `-` where there is none."""
    return with_interval(*(None if end is None else 100 * end for end in gain), form="+.1f", unit=" %")


def verdict(speedup_interval: Interval) -> str:
    """Judge whether a drafter makes decoding faster, from the interval of its decode_speedup.

    Returns:
        `faster`, `slower`, `no clear difference` or `too few prompts`.
    """
    return _judge(speedup_interval, 1, "faster", "slower")


def _judge(interval: Interval, border: int, above: str, below: str) -> str:
    """Tell on which side of a border an interval lies."""
    low, high = interval
    if low is None or high is None:
        return "too few prompts"
    return above if low > border else below if high < border else "no clear difference"


def judge_gain(row: ComparedRow) -> str:
    """Judge an objective from the interval of its gain: `better`, `worse`, or as `verdict` otherwise."""
    return _judge(row.gain[1:], 0, "better", "worse")


def advice(results: BenchResults) -> str:
    """Tell on which sets decoding is faster; where that is none, tell so and what can be done."""
    rows = [row for row in results.rows if row.width != "copies"] or results.rows
    faster = dict.fromkeys(row.set for row in rows if verdict(row.decode_speedup_interval) == "faster")
    others = [name for name in dict.fromkeys(row.set for row in rows) if name not in faster]
    if faster:
        found = f"faster than plain decoding on {' and '.join(faster)}"
        rest = f"but not clearly on {' and '.join(others)}: measure more prompts there, or decode without the drafter"
        return f"{found}, {rest}" if others else found
    if all(verdict(row.decode_speedup_interval) == "slower" for row in rows):
        start = "nothing here is faster than plain decoding: decode without this drafter, or"
    else:
        start = "nothing here is clearly faster than plain decoding: measure more prompts, or"
    return f"{start} train longer or on more prompts (docs/train.md)"


def copied_note(rows: Sequence[Row]) -> str:
    """Tell how many tokens of each set prompt lookup copied with width `auto`; empty where it copied none."""
    several = len({row.drafter for row in rows}) > 1
    shares = {
        (f"{row.set}, {row.drafter}," if several else row.set, row.temperature): row.share_copied
        for row in rows
        if row.width == "auto"
    }
    if not any(shares.values()):
        return ""
    listed = ", ".join(f"{name} {share:.0%} at T={temperature:g}" for (name, temperature), share in shares.items())
    return f"with width auto, tokens copied from the text before them (prompt lookup): {listed}"


def compiled_note(rows: Sequence[Row]) -> str:
    """Compare the fastest way on each set with compiled plain decoding; empty where it was not measured."""
    best: dict[tuple[str, float], float] = {}
    for row in rows:
        if row.compiled and row.compiled.decode_speedup is not None:
            key = row.set, row.temperature
            best[key] = max(best.get(key, 0.0), row.compiled.decode_speedup)
    listed = ", ".join(f"{name} {speedup:.2f} at T={temperature:g}" for (name, temperature), speedup in best.items())
    return f"over plain decoding with compiled steps, the fastest way each: {listed}" if listed else ""


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _with_and_without(name: str, read: Callable[[Any], Estimate]) -> tuple[Column, Column]:
    """Make the terminal's column of a number, and the page's with its interval."""
    return (
        Column(name, lambda row: with_interval(read(row)[0]), only="terminal"),
        Column(f"{name} [95 %]", lambda row: with_interval(*read(row)), only="page"),
    )


VERDICT = Column("verdict", lambda row: verdict(row.decode_speedup_interval))
SET = Column("set", attrgetter("set"))
TEMPERATURE = Column("T", lambda row: f"{row.temperature:g}")
DRAFTER = Column("drafter", attrgetter("drafter"))
WIDTH = Column("width", lambda row: str(row.width))
TAU, TAU_INTERVAL = _with_and_without("tau", lambda row: (row.tau, *row.tau_interval))
SPEEDUP = Column("decode_speedup [95 %]", lambda row: with_interval(row.decode_speedup, *row.decode_speedup_interval))
RATE = Column("tok/s", lambda row: _rate(row.tokens_per_second))
PLAIN_RATE = Column("plain tok/s", lambda row: _rate(row.plain_tokens_per_second))
SAME_TEXT = Column(
    "same text",
    lambda row: (
        f"{row.num_same_text}/{row.num_responses}"
        if row.num_same_text is not None and getattr(row, "keeps_text", True)
        else "-"
    ),
)
"""Columns of several kinds of rows."""

RESULT_COLUMNS = (
    VERDICT,
    SET,
    TEMPERATURE,
    DRAFTER,
    WIDTH,
    SPEEDUP,
    TAU,
    TAU_INTERVAL,
    RATE,
    PLAIN_RATE._replace(only="page"),
    Column("tau*", lambda row: with_interval(row.published.tau), only="page"),
    Column("speedup*", lambda row: with_interval(row.published.decode_speedup), only="page"),
    SAME_TEXT,
)
"""What is written of a `Row`; a star marks what published tables have, see `dpace.metrics.published_tau`."""


def result_columns(rows: Iterable[Row]) -> tuple[Column, ...]:
    """Return the columns of these rows: with compiled plain decoding where that was measured."""
    if not any(row.compiled for row in rows):
        return RESULT_COLUMNS
    return (
        *RESULT_COLUMNS,
        Column("compiled plain tok/s", lambda row: RATE.write(row.compiled) if row.compiled else "-", only="page"),
        Column(
            "over compiled plain [95 %]", lambda row: SPEEDUP.write(row.compiled) if row.compiled else "-", only="page"
        ),
    )


PAIR_COLUMNS = (
    Column("verdict", lambda row: verdict(row.speed_ratio[1:])),
    SET,
    TEMPERATURE,
    DRAFTER,
    WIDTH,
    Column("tau [95 %]", lambda row: percent(row.tau_gain)),
    *_with_and_without("speed ratio", attrgetter("speed_ratio")),
)
"""What is written of a `Comparison`."""


def served_verdict(row: ServerRow) -> str:
    """Judge whether a server accepts what this process does."""
    if row.tau is None:
        return "not known"
    if row.tau_here[0] is None:
        return "no tau here"
    return _judge(row.tau_over_here[1:], 0, "accepts more", "accepts less")


SERVER_COLUMNS = (
    Column("verdict", served_verdict),
    SET,
    TEMPERATURE,
    TAU,
    TAU_INTERVAL,
    *_with_and_without("tau here", attrgetter("tau_here")),
    Column("over here [95 %]", lambda row: percent(row.tau_over_here), only="page"),
    RATE,
    PLAIN_RATE,
    SAME_TEXT,
    Column(
        "control",
        lambda row: "-" if row.control_same_text is None else f"{row.control_same_text}/{row.num_responses}",
    ),
)
"""What is written of a `ServerRow`."""


def texts_note(rows: Iterable[ServerRow]) -> str:
    """Compare greedy texts with those of the plain server's second pass, set by set; empty without such a server."""
    judged = [
        f"{row.set} {_judge(row.same_text_gain[1:], 0, 'more often equal', 'less often equal')}"
        for row in rows
        if row.temperature == 0 and row.num_same_text is not None
    ]
    return f"greedy texts against the control, the plain server's second pass: {', '.join(judged)}" if judged else ""


def compared_columns(baseline: str, decoded: Sequence[Row] = ()) -> list[Column]:
    """Return the columns of `dpace compare`.

    Args:
        baseline: the objective that the others are compared with.
        decoded: rows of decoding, of which those at temperature 0 are shown; what has none is written as `-`.
    """
    speeds = {(row.set, row.drafter): SPEEDUP.write(row) for row in decoded if row.temperature == 0}

    def unless_baseline(write: Callable[[ComparedRow], str], otherwise: str = "-") -> Callable[[ComparedRow], str]:
        return lambda row: otherwise if row.drafter == baseline else write(row)

    def by_seed(row: ComparedRow) -> str:
        return " ".join("-" if value is None else f"{100 * value:+.1f}" for value in row.gain_by_seed)

    judge = unless_baseline(judge_gain, "baseline")
    return [
        Column("verdict", judge),
        SET,
        Column("objective", attrgetter("drafter")),
        TAU,
        TAU_INTERVAL,
        Column(f"over {baseline} [95 %]", unless_baseline(lambda row: percent(row.gain))),
        Column("by seed", unless_baseline(by_seed), only="page"),
        Column(SPEEDUP.heading, lambda row: speeds.get((row.set, row.drafter), "-"), only="page"),
        Column("ms/step", lambda row: "-" if row.step_seconds is None else f"{1000 * row.step_seconds:.0f}"),
        Column(
            "peak GiB",
            lambda row: "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}",
            only="page",
        ),
    ]


def as_markdown(text: str) -> str:
    """Escape what Markdown and HTML would read in a text, in one line."""
    text = re.sub(r"([\\`|*~])", r"\\\1", html.escape(one_line(text), quote=False))
    return text.replace("](", "]\\(").replace("![", "!\\[")


def as_code(text: str) -> str:
    """Write a text that stands between backticks, also in a table."""
    return one_line(text).replace("`", "'").replace("|", "\u00a6").replace("<", "\u2039")
