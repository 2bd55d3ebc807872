"""A section of the page, and figures as SVG that take the colors of the page."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpace.measure.rows import Example, Row
from dpace.report.markdown import one_line

PANEL_INCHES = 4.4, 3.3
"""Size of every panel on the page, so that they stand side by side."""
INK, SOFT, LINE = "#5eed20", "#5eed21", "#5eed22"
SERIES = tuple(f"#5eed{i:02x}" for i in range(10))
MOMENTS = tuple(f"#5eed{i:02x}" for i in range(16, 21))
"""Colors that stand for variables of the page's style, which has one set for light and one for dark."""
VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    **{color: f"--series-{i}" for i, color in enumerate(SERIES)},
    **{color: f"--moment-{i}" for i, color in enumerate(MOMENTS)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpace",
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
}


@dataclass(frozen=True)
class Section:
    """A heading, what to read from it, and a table or figures."""

    title: str
    text: str
    rows: Sequence[Sequence[str]] = ()
    """The first row holds the headings; the first column is text."""
    figures: Sequence[str] = ()
    """Panels as SVG, all of one size."""
    examples: Sequence[tuple[str, Example]] = ()
    """Responses to show, each with the name of its set."""


@contextmanager
def drawing() -> Iterator[Any]:
    """Give matplotlib with the style of the page."""
    plt = pyplot()
    from matplotlib.rcsetup import cycler

    with plt.rc_context({**STYLE, "axes.prop_cycle": cycler(color=SERIES)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only the width of a name is then a guess
        yield plt


def panels(rows: Sequence[Row], draw: Callable[[Any, list[Row]], None], ylabel: str) -> list[str]:
    """Draw one panel a set, all with the same vertical axis; each as SVG."""
    names = list(dict.fromkeys(row.set for row in rows))
    return draw_panels({name: [row for row in rows if row.set == name] for name in names}, draw, ylabel)


def draw_panels(content: dict[str, Any], draw: Callable[[Any, Any], None], ylabel: str) -> list[str]:
    """Draw one panel for each title, all with the same vertical axis; each as SVG.

    Args:
        content: by title, what `draw` gets beside the axes.
        draw: called for each panel; its artists' labels make the legend.
        ylabel: of the vertical axis.
    """
    with drawing() as plt:
        made = [plt.subplots(figsize=PANEL_INCHES, layout="constrained") for _ in content]
        for (figure, axis), (title, values) in zip(made, content.items(), strict=True):
            draw(axis, values)
            axis.set_title(label(title))
            axis.set_ylabel(ylabel)
            axis.grid(alpha=0.6)
            if axis.get_legend_handles_labels()[0]:
                figure.legend(loc="outside lower center", ncols=2)
        ends = [axis.get_ylim() for _, axis in made]
        for _, axis in made:
            axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        return [svg(figure) for figure, _ in made]


def whole_ticks(axis: Any, values: Sequence[int] = ()) -> None:
    """Put ticks of the horizontal axis at integers: at these values where they are few, else at some."""
    from matplotlib.ticker import MaxNLocator

    if 0 < len(values) <= 16:
        axis.set_xticks(list(values))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def label(text: str) -> str:
    """Write a name that a figure shows as it is: no mathematics, and not hidden by a first underscore."""
    text = one_line(text)[:80].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def svg(figure) -> str:
    """Close a figure, and return it as SVG that scales with the page and takes its colors."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    return re.sub("#5eed[0-9a-f]{2}", lambda found: f"var({VARIABLES[found[0]]})", text[text.index("<svg") :])


def standalone(text: str) -> str:
    """Put the page's colors, light and dark, into an SVG that stands in a file of its own."""
    page = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    rules = page[page.index(":root") : page.index("* {")].replace("screen and ", "")
    head, end, body = text.partition(">")
    return f"{head}{end}<style>{rules} svg {{ background: var(--page); }}</style>{body}"


def pyplot():
    """Load matplotlib, for a machine without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
