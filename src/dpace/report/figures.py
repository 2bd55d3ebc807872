"""A section of the page, and figures as SVG."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpace.measure.rows import Example, Row
from dpace.report.markdown import one_line


@dataclass(frozen=True)
class Section:
    """A heading, what to read from it, and a table or a figure."""

    title: str
    text: str
    rows: Sequence[Sequence[str]] = ()
    """The first row holds the headings; the first column is text."""
    figure: str = ""
    """SVG."""
    examples: Sequence[tuple[str, Example]] = ()
    """Responses to show, each with the name of its set."""


def panels(rows: Sequence[Row], draw: Callable[[Any, list[Row]], None], ylabel: str) -> str:
    """Draw one panel a set; the figure as SVG."""
    plt = pyplot()
    names = list(dict.fromkeys(row.set for row in rows))
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.5 * columns, 3.4 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        draw(axis, [row for row in rows if row.set == name])
        axis.set_title(label(name))
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel(ylabel)
    return svg(figure)


def label(text: str) -> str:
    """Write a name that a figure shows as it is: no mathematics, and not hidden by a first underscore."""
    text = one_line(text)[:80].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def svg(figure) -> str:
    """Close a figure, and return it as SVG that scales with the page."""
    buffer = io.StringIO()
    with pyplot().rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpace"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only the width of a name is then a guess
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def pyplot():
    """Load matplotlib, for a machine without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
