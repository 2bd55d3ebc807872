"""Write to a terminal: the progress bar of long work, and texts that cannot steer it."""

import sys
import time
import unicodedata
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpace.system import ranks

LINE_SECONDS = 30.0
"""Most seconds between two lines of progress where there is no terminal, as long as steps are shorter."""

STEERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Unicode's classes of marks that change the direction in which a text is shown."""


def is_terminal() -> bool:
    """Return whether progress is seen on a terminal, where a bar can be drawn."""
    return sys.stderr.isatty()


class PlainLines:
    """Progress written as lines: the first step, then one in `LINE_SECONDS`, and the end.

    Args:
        name: of the work.
        total: number of steps.
        done: steps that were done before.
    """

    def __init__(self, name: str, total: int | float, done: int | float = 0):
        self.name = name
        self.total = total
        self.first = done
        self.start = time.monotonic()
        self.last: float | None = None

    def update(self, done: int | float, info: str = "") -> None:
        """Write a line if it is time for one."""
        now = time.monotonic()
        if self.last is not None and now - self.last < LINE_SECONDS and done < self.total:
            return
        self.last = now
        elapsed, steps = now - self.start, done - self.first
        rate = steps / elapsed if elapsed > 0 else 0.0
        eta = f", ETA {format_clock((self.total - done) / rate)}" if rate and done < self.total else ""
        parts = [f"{self.name}: {done:g} of {self.total:g} in {format_clock(elapsed)}, {rate:.3g} a second{eta}", info]
        print(printable("; ".join(part for part in parts if part)), file=sys.stderr, flush=True)


def format_clock(seconds: int | float) -> str:
    """Write a time as hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _LinesInPlaceOfABar(Progress):
    """A bar of rich that draws nothing and writes lines."""

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options, disable=True)
        self.lines: dict[TaskID, PlainLines] = {}

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        """Add a piece of work."""
        task = super().add_task(description, *args, **options)
        self.lines[task] = PlainLines(description, self.tasks[task].total or 0, self.tasks[task].completed)
        return task

    def update(self, task_id: TaskID, **options: Any) -> None:
        """Move on."""
        super().update(task_id, **options)
        self._write_line(task_id)

    def advance(self, task_id: TaskID, advance: int | float = 1) -> None:
        """Move on by a number of steps."""
        super().advance(task_id, advance)
        self._write_line(task_id)

    def _write_line(self, task_id: TaskID) -> None:
        task = self.tasks[task_id]
        self.lines[task_id].update(task.completed, str(task.fields.get("info", "")))


def progress_bar() -> Progress:
    """Make a bar with count, elapsed time and ETA, on stderr; lines where that is no terminal.

    Of several ranks, only the first one shows its.
    """
    if not ranks.is_first():
        return Progress(disable=True)
    return (Progress if is_terminal() else _LinesInPlaceOfABar)(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=Console(stderr=True),
    )


def printable(text: str) -> str:
    r"""Show the control characters of a text as `\x1b`, so that it cannot steer a terminal.

    Line feeds and tabs stay. Marks that turn the direction of writing and halves of characters are shown too.
    """
    return "".join(_escape(character) if not character.isprintable() else character for character in text)


def _escape(character: str) -> str:
    """Write a character as an escape where it can do harm."""
    is_harmful = unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in STEERING
    if not is_harmful or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()


def print_text(text: str, end: str = "\n") -> None:
    """Print a text; on a terminal, its control characters are shown and not obeyed."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)
