"""Tables of results for the terminal, in 80 columns; the page of `dpace report` has all that is known."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpace.measure.results import BenchResults, Row
from dpace.report.cells import DRAFTER, SET, TEMPERATURE, Column, Section
from dpace.system.progress import one_line

MAX_SLOTS = 15
"""Columns of slots that fit 80 characters."""
NAMES = ("set", "drafter", "objective")
"""Columns that may be folded over lines."""
WORDS = ("verdict", "width", "context")
"""Other columns that begin at the left."""
STYLES = {"fails": "bold red", "warns": "yellow", "skipped": "dim"}
"""Style of a line of `dpace doctor`, by its result."""


def console() -> Console:
    """Return the console for tables: as wide as the terminal, and at least 80 columns."""
    return Console(width=max(80, Console().width))


def section_table(section: Section) -> Table:
    """Make the table of a section of the page, with the columns that fit.

    Names may be folded over lines, numbers are never cut.
    """
    table = Table(title=plain(section.title), caption=plain(section.note) or None, box=SIMPLE_HEAD, padding=0)
    kept = [column for column in section.columns if column.only != "page"]
    for column in kept:
        at = " [" if " [" in column.heading else " "  # broken before its unit, or else at its first space
        heading = plain(column.heading).replace(at, "\n" + at[1:], 1)
        is_name = column.heading in NAMES
        justify = "left" if is_name or column.heading in WORDS else "right"
        table.add_column(heading, justify=justify, no_wrap=not is_name, overflow="fold" if is_name else "ellipsis")
    for row in section.items:
        table.add_row(*(plain(column.write(row)) for column in kept))
    return table


def slots_table(results: BenchResults) -> Table:
    """Make one line for each drafter: how often the drafts of a block are all accepted up to each slot, in percent.

    There are at most `MAX_SLOTS` slots, evenly chosen, with the first and the last.
    """
    rows = results.whole_blocks
    last = max((row.block_size for row in rows), default=1) - 1
    slots = np.linspace(1, last, min(last, MAX_SLOTS)).round().astype(int).tolist()

    def write(slot: int, row: Row) -> str:  # a drafter's blocks may be shorter
        return f"{100 * row.reach_rate[slot - 1]:.0f}" if slot < row.block_size else ""

    columns = [SET, TEMPERATURE, DRAFTER, *(Column(str(slot), partial(write, slot)) for slot in slots)]
    return section_table(Section("reach rate in %: slots 1..k all accepted", "", columns, rows))


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
        shown = result.upper() if result == "fails" else result
        expected = expected if result in ("fails", "warns") else ""
        table.add_row(*map(plain, [shown, name, found, expected, fix]), style=STYLES.get(result, ""))
    return table


def plain(text: str) -> str:
    """Write a text that the terminal shows as it is: in one line, and no markup of rich."""
    return escape(one_line(text))


def _text_table(title: str, *headings: str) -> Table:
    """Make a table of texts, which are folded over lines."""
    table = Table(title=plain(title), box=SIMPLE_HEAD, padding=0)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
