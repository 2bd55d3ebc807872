"""Describe a table once; write it for the terminal and in Markdown. The page's template writes the same.

In come texts by heading. The terminal has 80 columns or more: where a table is too wide, what stands in brackets gets
a line of its own, and words are folded. Numbers are never cut.
"""

import html
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpace.system.progress import one_line

MAX_WIDTH = 10_000
"""Columns of the widest terminal."""


class Section(NamedTuple):
    """A heading, what to read from it, and a table or a drawing. The terminal shows heading, table and note."""

    title: str
    text: str = ""
    rows: Sequence[Mapping[str, str]] = ()
    """Cells by heading; the first row has the headings of the table."""
    num_texts: int = 1
    """Columns of words, which come first and begin at the left; the other columns are numbers."""
    note: str = ""
    """Stands below the table."""
    drawing: str = ""
    """An SVG; only the page has it."""


class _Console(Console):
    """A console that leaves a reader who has enough, as `head` has, to `dpace.cli`."""

    def on_broken_pipe(self) -> None:
        """Raise what rich would end the process for."""
        raise BrokenPipeError


def console() -> Console:
    """Return the console for tables: as wide as the terminal, and at least 80 columns."""
    return _Console(width=max(80, Console().width))


def section_table(section: Section) -> Table:
    """Make the terminal's table, with intervals on lines of their own where it would be too wide."""
    table = _table(section, " ")
    # On a console that is wide enough, `maximum` is what the table takes without any folding.
    if Console(width=MAX_WIDTH).measure(table).maximum > console().width:
        table = _table(section, "\n")
    return table


def _table(section: Section, before_brackets: str) -> Table:
    """Make the terminal's table, with a space or a line end before what stands in brackets in columns of numbers."""
    table = Table(
        title=plain(section.title), caption=plain(section.note), caption_justify="left", box=SIMPLE_HEAD, padding=0
    )
    broken = partial(re.sub, r" (?=[\[(])", before_brackets)
    for number, heading in enumerate(map(plain, section.rows[0])):
        if number < section.num_texts:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(broken(heading), justify="right", no_wrap=True)
    for row in section.rows:
        texts = list(map(plain, row.values()))
        table.add_row(*texts[: section.num_texts], *map(broken, texts[section.num_texts :]))
    return table


def plain(text: str) -> str:
    """Write a text that the terminal shows as it is: in one line, and no markup of rich."""
    return escape(one_line(text))


def to_markdown(section: Section) -> str:
    """Write a section in Markdown, without its drawing."""
    headings = list(section.rows[0])
    lines = [headings, ["---"] * len(headings)]
    lines += [list(row.values()) for row in section.rows]
    table = "\n".join(f"| {' | '.join(map(as_markdown, line))} |" for line in lines)
    paragraphs = f"## {as_markdown(section.title)}", as_markdown(section.text), table, as_markdown(section.note)
    return "\n\n".join(filter(None, paragraphs))


def as_markdown(text: str) -> str:
    """Escape what Markdown and HTML would read in a text, in one line."""
    text = re.sub(r"([\\`|*~])", r"\\\1", html.escape(one_line(text), quote=False))
    # Links and images, which brackets alone do not make: intervals keep theirs.
    return text.replace("](", "]\\(").replace("![", "!\\[")


def as_code(text: str) -> str:
    """Write a text that stands between backticks, also in a table."""
    # Nothing can be escaped there, so characters that look alike stand for what would end the code, cell or page.
    return one_line(text).replace("`", "'").replace("|", "\u00a6").replace("<", "\u2039")
