"""Put text that others wrote into Markdown and into a line, so that it is shown as it is."""

import html

from dpace.progress import printable


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
