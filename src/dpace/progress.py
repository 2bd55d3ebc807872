"""What a terminal is shown: the progress bar of long work, and texts that cannot steer it."""

import sys
import unicodedata

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

STEERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Unicode's classes of marks that change the direction in which a text is shown."""


def progress_bar() -> Progress:
    """Make a bar with count, elapsed time and ETA, on stderr."""
    return Progress(
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
    return "".join(_show(character) if not character.isprintable() else character for character in text)


def _show(character: str) -> str:
    """Write a character as an escape where it can do harm."""
    is_harmful = unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in STEERING
    if not is_harmful or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()


def show(text: str, end: str = "\n") -> None:
    """Print a text; on a terminal, its control characters are shown and not obeyed."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)
