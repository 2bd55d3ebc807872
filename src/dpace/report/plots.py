"""Sections of plots, from rows of results and from training logs, as SVG.

Each plot has a panel for each set, drafter or axis, all of one size and with one vertical axis. The page of `dpace
report` takes the panels one by one, in its own colors; `save_figures` puts those of a section into a file.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from dpace.measure.records import group_by
from dpace.measure.results import ComparedRow, Row
from dpace.metrics import MIN_PROMPTS
from dpace.report.cells import Section
from dpace.system.ledger import write_text
from dpace.system.progress import one_line

PANEL_INCHES = 4.4, 3.3
"""Size of every panel, so that they stand side by side."""
INK = "#5eed20"
SOFT = "#5eed21"
LINE = "#5eed22"
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
Logs = Mapping[str, Sequence[Sequence[dict]]]
"""Training logs by objective, one for each seed."""
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


def acceptance_by_slot(rows: Sequence[Row] | Sequence[ComparedRow]) -> Section:
    """Draw the reach rate by slot, with intervals where the responses are known."""

    def draw(axes, of_set: list[Row | ComparedRow]) -> None:
        for row in of_set:
            slots = range(1, row.block_size)
            name = label(f"{row.drafter}, T={row.temperature:g}")
            (line,) = axes.plot(slots, row.reach_rate, marker="o", ms=3, label=name)
            if isinstance(row, Row) and len(row.acceptance.rows) >= MIN_PROMPTS:
                low, high = row.acceptance.reach_interval()
                axes.fill_between(slots, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axes.set(xlabel="slot", ylim=(0, 1.02))
        whole_ticks(axes, range(1, of_set[0].block_size))

    text = "The share of verifications that accepted slots 1 to k of a whole draft, with 95 % intervals over prompts."
    by_set = group_by(rows, attrgetter("set"))
    return Section("Acceptance by slot", text, figures=draw_panels(by_set, draw, "reach rate"))


def tau_curves(groups: Logs) -> Section:
    """Draw tau of the validation responses against steps and against time, a line for each drafter."""

    def draw(axis, is_time: bool) -> None:
        for number, (name, runs) in enumerate(groups.items()):
            named: str | None = label(name)
            for log in runs:
                curve = _tau_curve(log)
                if len(curve):
                    times, taus = curve[:, int(is_time)], curve[:, 2]
                    axis.plot(times, taus, marker="o", ms=3, color=SERIES[number % len(SERIES)], label=named)
                    named = None
        axis.set_xlabel("minutes of training steps" if is_time else "optimizer step")
        whole_ticks(axis)

    figures = draw_panels({"by steps": False, "by time": True}, draw, "tau, validation")
    text = "Measured on the validation share of the training prompts, which chooses the checkpoint."
    return Section("Training", text, figures=figures)


def _tau_curve(log: Sequence[dict]) -> np.ndarray:
    """Return the evaluations of a log, "evaluation 3": step, minutes of training steps, and tau."""
    seconds = 0.0
    clock = {0: 0.0}
    for entry in log:
        if "step_seconds" in entry:
            seconds += entry["step_seconds"] * (entry["step"] - max(clock))
            clock[entry["step"]] = seconds
    evaluations = [(entry["step"], entry["eval_tau"]) for entry in log if "eval_tau" in entry]
    minutes = np.interp([step for step, _ in evaluations], list(clock), list(clock.values())) / 60
    return np.array([(step, at, tau) for (step, tau), at in zip(evaluations, minutes, strict=True)])


def slot_weights(groups: Logs) -> Section:
    """Draw each slot's share of the weight at a few moments of training, one panel an objective (its first seed).

    Source: the weight-dynamics figure of D-PACE (arXiv 2605.18810).
    """

    def draw(axis, log: Sequence[dict]) -> None:
        entries = [entry for entry in log if "weight_share/1" in entry]
        chosen = np.linspace(0, len(entries) - 1, min(len(entries), len(MOMENTS))).round().astype(int)
        for color, entry in zip(MOMENTS, [entries[number] for number in chosen], strict=False):
            slots = sorted(int(key[13:]) for key in entry if re.fullmatch(r"weight_share/\d{1,4}", key))
            shares = [entry[f"weight_share/{slot}"] for slot in slots]
            axis.plot(slots, shares, marker="o", ms=3, color=color, label=f"step {entry['step']}")
            whole_ticks(axis, slots)
        axis.set_xlabel("slot")

    text = (
        "Each slot's share of a block's weight, at up to five steps. D-PACE moves weight to later slots as the drafter "
        "gets better at the first ones; fixed schedules do not."
    )
    content = {name: runs[0] for name, runs in groups.items()}
    return Section("Weights over training", text, figures=draw_panels(content, draw, "share of the weight"))


def save_figures(section: Section, path: str | Path) -> None:
    """Write the panels of a section side by side into an SVG file, with the page's colors, light and dark."""
    write_text(path, standalone(*section.figures))


def standalone(*panels: str) -> str:
    """Make an SVG that stands in a file of its own from panels, side by side."""
    page = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    rules = page[page.index(":root") : page.index("* {")].replace("screen and ", "")
    parts = []
    left = height = 0.0
    for panel in panels:
        sizes = [float(size) for size in re.findall(r'="([\d.]+)pt"', panel)[:2]]  # width and height
        panel = re.sub(r'="([\d.]+)pt"', r'="\1"', panel, count=2)
        parts.append(panel.replace("<svg", f'<svg x="{left:g}"', 1))
        left += sizes[0]
        height = max(height, sizes[1])
    style = f"<style>{rules} svg {{ background: var(--page); }}</style>"
    size = f'width="{left:g}pt" height="{height:g}pt" viewBox="0 0 {left:g} {height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(parts)}</svg>\n'


def draw_panels(content: Mapping[str, Any], draw: Callable[[Any, Any], None], ylabel: str) -> list[str]:
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
        ends = np.array([axis.get_ylim() for _, axis in made])
        for _, axis in made:
            axis.set_ylim(ends.min(), ends.max())
        return [svg(figure) for figure, _ in made]


@contextmanager
def drawing() -> Iterator[Any]:
    """Yield matplotlib's pyplot with the style of the page, for a machine without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.rcsetup import cycler

    style = {**STYLE, "axes.prop_cycle": cycler(color=SERIES)}
    with plt.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only the width of a name is then a guess
        yield plt


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
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return re.sub("#5eed[0-9a-f]{2}", lambda found: f"var({VARIABLES[found[0]]})", text[text.index("<svg") :])
