"""Write to a terminal: the progress bar of long work, and texts that cannot steer it."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

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
from rich.table import Column

from dpace.system import ranks

Item = TypeVar("Item")
LINE_SECONDS = 30.0
"""Most seconds between two lines of progress where there is no terminal, as long as steps are shorter."""

MAX_VALUE = 60
"""Characters of a wrong value that a message shows."""
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that change the direction in which a text is shown, and halves of characters."""


class _LinesInPlaceOfABar(Progress):
    """A bar of rich that draws nothing and writes lines: the first step, then one in `LINE_SECONDS`, and the end."""

    def update(self, task_id: TaskID, **options: Any) -> None:
        """Move on, and write a line if it is time for one."""
        task = self.tasks[task_id]
        super().update(task_id, **options)
        elapsed = task.elapsed or 0.0
        if elapsed - task.fields.get("written", -LINE_SECONDS) < LINE_SECONDS and not task.finished:
            return
        task.fields["written"] = elapsed
        line = f"{task.description}: {task.completed:g} of {task.total:g} in {timedelta(seconds=int(elapsed))}"
        if task.time_remaining:  # known after two steps
            line += f", ETA {timedelta(seconds=int(task.time_remaining))}"
        if info := task.fields["info"]:
            line += f"; {info}"
        print(printable(line), file=sys.stderr, flush=True)


def progress_bar(is_shown: bool = True) -> Progress:
    """Make a bar with count, elapsed time and ETA, on stderr; lines where that is no terminal.

    Of several ranks, only the first one shows its.
    """
    if not (is_shown and ranks.is_first()):
        return Progress(disable=True)
    is_terminal = sys.stderr.isatty()
    kind = Progress if is_terminal else _LinesInPlaceOfABar
    whole = partial(Column, no_wrap=True)  # of 80 characters, numbers and times are all shown; texts are cut
    return kind(
        TextColumn("{task.description}", table_column=Column(max_width=24, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=10, table_column=whole(min_width=10)),
        MofNCompleteColumn(table_column=whole()),
        TimeElapsedColumn(table_column=whole(min_width=7)),
        TextColumn("ETA", table_column=whole(min_width=3)),
        TimeRemainingColumn(table_column=whole(min_width=7)),
        TextColumn("{task.fields[info]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=Console(stderr=True),
        expand=True,
        disable=not is_terminal,
        get_time=time.monotonic,
        speed_estimate_period=3600.0,  # seconds; some steps take minutes
    )


def track(items: Sequence[Item], title: str, *, size: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
    """Yield items, and show how many are done; nothing is shown without a title.

    An item counts as `size` says.
    """
    with progress_bar(is_shown=bool(title)) as bar:
        task = bar.add_task(title, total=sum(map(size, items)), info="")
        for item in items:
            yield item
            bar.update(task, advance=size(item))


def count(number: int, noun: str) -> str:
    """Write a number of things, such as 1 prompt or 2,000 prompts."""
    ending = "" if number == 1 else "s"
    return f"{number:,} {noun}{ending}"


def printable(text: str) -> str:
    r"""Show what can steer a terminal, but for line feeds and tabs, as an escape such as `\x1b`."""
    return STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """Write a text, or what an error says, without line ends and control characters."""
    return printable(" ".join(str(text).split()))


def shorten(text: object, width: int) -> str:
    """Write the beginning of a text in one line of at most `width` characters, cut between words."""
    line = one_line(text)
    if len(line) <= width:
        return line
    beginning = line[: width - 3]
    words = beginning.rpartition(" ")[0]  # without the last one, which may be cut
    return f"{words or beginning}..."


def note(text: str) -> None:
    """Print a message on stderr, once for all ranks, so that it cannot steer a terminal."""
    if ranks.is_first():
        print(printable(text), file=sys.stderr, flush=True)


def describe_error(error: BaseException) -> str:
    """Return the kind of an error and what it says, in one line."""
    return one_line(f"{type(error).__name__}: {error}")


def quoted(value: object) -> str:
    """Return a wrong value as a message shows it, at most `MAX_VALUE` characters of it."""
    text = "null" if value is None else printable(repr(value))  # as YAML and JSON write it
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def print_text(text: str, end: str = "\n") -> None:
    """Print a text; on a terminal, its control characters are shown and not obeyed."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)
