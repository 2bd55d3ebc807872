"""Tables of results for the terminal, in 80 columns; the page of `dpace report` has all that is known."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpace.measure.results import BenchResults, CompareResults, Comparison, Row, ServerResults
from dpace.report.cells import (
    CONTEXT_COLUMNS,
    DRAFTER,
    PAIR_COLUMNS,
    SERVER_COLUMNS,
    SET,
    TEMPERATURE,
    Column,
    compared_columns,
    compiled_note,
    copied_note,
    find_parts,
    one_line,
    result_columns,
)

MAX_SLOTS = 15
"""Columns of slots that fit 80 characters."""
STYLES = {"fails": "bold red", "warns": "yellow", "skipped": "dim"}
"""Style of a line of `dpace doctor`, by its result."""


def console() -> Console:
    """Return the console for tables: as wide as the terminal, and at least 80 columns."""
    return Console(width=max(80, Console().width))


def results_table(results: BenchResults) -> Table:
    """Make one line for each drafter, width, set and temperature, with 95 % intervals or counts.

    With width `auto`, tau counts tokens a pass of the target, passes without a draft included, and tokens that were
    copied from the text instead of drafted; the caption says how many.
    """
    title = f"{Path(results.target).name}, {results.dtype}, {results.hardware.device}"
    caption = "; ".join(filter(None, [copied_note(results.rows, start=""), compiled_note(results.rows)]))
    return _table(result_columns(results.rows), results.rows, title, caption)


def slots_table(results: BenchResults) -> Table:
    """Make one line for each drafter: how often the drafts of a block are all accepted up to each slot, in percent.

    There are at most `MAX_SLOTS` slots, evenly chosen, with the first and the last.
    """
    rows = results.whole_blocks
    last = max((row.block_size for row in rows), default=1) - 1
    slots = list(range(1, last + 1))
    if last > MAX_SLOTS:
        slots = [1 + round(i * (last - 1) / (MAX_SLOTS - 1)) for i in range(MAX_SLOTS)]

    def reach(slot: int) -> Column:
        def write(row: Row) -> str:  # a drafter's blocks may be shorter
            return f"{100 * row.reach_rate[slot - 1]:.0f}" if slot < row.block_size else ""

        return Column(str(slot), write)

    columns = [SET, TEMPERATURE, DRAFTER, *map(reach, slots)]
    return _table(columns, rows, "reach rate in %: slots 1..k all accepted")


def drafters_table(comparisons: Sequence[Comparison]) -> Table:
    """Make one line for each drafter but the first: against it, on the same prompts."""
    title = f"compared with {comparisons[0].baseline} on the same prompts, with 95 % intervals"
    return _table(PAIR_COLUMNS, comparisons, title)


def contexts_table(results: BenchResults) -> Table:
    """Make one line for each category and each range of context lengths, with tau of whole drafts."""
    return _table(CONTEXT_COLUMNS, find_parts([results]), "by category and by length of the prompt")


def servers_table(results: ServerResults) -> Table:
    """Make one line for each set, temperature and concurrency."""
    servers = ", ".join(f"{side} {server.engine} at {server.url}" for side, server in results.servers.items())
    return _table(SERVER_COLUMNS, results.rows, f"{Path(results.target).name}: {servers}")


def compare_table(results: CompareResults) -> Table:
    """Make one line for each set and objective: tau, its gain, and what training and decoding took."""
    columns = compared_columns(results.baseline, results.decode.rows if results.decode else ())
    seeds = ", ".join(map(str, results.seeds))
    title = f"{Path(results.target).name}, reduction {results.reduction}, seeds {seeds}, T=0"
    return _table(columns, results.rows, title)


def check_table(findings: Sequence[tuple[str, str, bool, str]], title: str) -> Table:
    """Make one line for each check: whether it passed, name, cases, detail."""
    table = _text_table(title, "", "check", "cases", "found")
    for name, cases, is_passed, detail in findings:
        table.add_row(*map(plain, ["pass" if is_passed else "FAIL", name, cases, detail]))
    return table


def doctor_table(diagnoses: Sequence[tuple[str, str, str, str, str]], title: str) -> Table:
    """Make one line for each check: result, name, found, expected and, where it is not right, what to do."""
    table = _text_table(title, "", "check", "found", "expected", "to do")
    for name, result, found, expected, fix in diagnoses:
        cells = [
            result.upper() if result == "fails" else result,
            name,
            found,
            expected if result in ("fails", "warns") else "",
            fix,
        ]
        table.add_row(*map(plain, cells), style=STYLES.get(result, ""))
    return table


def plain(text: str) -> str:
    """Write a text that the terminal shows as it is: in one line, and no markup of rich."""
    return escape(one_line(text))


def _table(columns: Iterable[Column], rows: Iterable[Any], title: str, caption: str = "") -> Table:
    """Make a table; names may be folded over lines, numbers are never cut."""
    table = Table(title=plain(title), caption=plain(caption) or None, box=SIMPLE_HEAD, padding=0)
    kept = [column for column in columns if column.only != "page"]
    for column in kept:
        at = " [" if " [" in column.heading else " "  # broken before its unit, or else at its first space
        heading = plain(column.heading).replace(at, "\n" + at[1:], 1)
        is_name = column.heading in ("set", "drafter", "objective", "category")
        justify = "left" if column.is_text else "right"
        table.add_column(heading, justify=justify, no_wrap=not is_name, overflow="fold" if is_name else "ellipsis")
    for row in rows:
        table.add_row(*(plain(column.write(row)) for column in kept))
    return table


def _text_table(title: str, *headings: str) -> Table:
    """Make a table of texts, which are folded over lines."""
    table = Table(title=plain(title), box=SIMPLE_HEAD, padding=0)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
