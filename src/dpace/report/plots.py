"""Plots of results, for the page and as PNG files.

A section of the page, and figures as SVG that take the colors of the page.

Plots of training logs, for the page and as PNG files.

A log is the `log_history` of `trainer_state.json`.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dpace.config import Objective
from dpace.measure.results import BenchResults, ComparedRow, Example, Row
from dpace.report.cells import one_line

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


MAX_SCATTER = 400
"""Prompts of a set that are drawn."""


def slots(results: BenchResults) -> Section:
    """Draw acceptance by slot with intervals."""

    def draw(axes, rows):
        for number, row in enumerate(rows):
            acceptance = row.acceptance
            slot = np.arange(1, acceptance.block_size)
            low, high = acceptance.reach_interval()
            axes.plot(slot, acceptance.reach_rate, marker="o", ms=3, color=f"C{number}", label=_label(row))
            if len(acceptance.rows) > 1:
                axes.fill_between(slot, low, high, color=f"C{number}", alpha=0.15, lw=0)
        axes.set(xlabel="slot", ylim=(0, 1.02))
        whole_ticks(axes, range(1, rows[0].block_size))

    text = "The share of verifications that accepted slots 1 to k of a whole draft, with 95 % intervals over prompts."
    return Section("Acceptance by slot", text, figures=panels(results.whole_blocks, draw, "reach rate"))


def lengths(results: BenchResults) -> Section:
    """Draw the histogram of accepted lengths."""

    def draw(axes, rows):
        for number, row in enumerate(rows):
            counts = np.array(row.histogram, float)
            place = np.arange(len(counts)) + (number - (len(rows) - 1) / 2) * 0.8 / len(rows)
            axes.bar(place, counts / max(1, counts.sum()), 0.8 / len(rows), color=f"C{number}", label=_label(row))
        axes.set(xlabel="accepted draft tokens")
        whole_ticks(axes, range(len(rows[0].histogram)))

    text = "How many tokens of a whole draft a verification accepted."
    return Section("Accepted lengths", text, figures=panels(results.whole_blocks, draw, "share of verifications"))


def widths(results: BenchResults) -> Section:
    """Draw the measured speed against the verification length."""

    def draw(axes, rows):
        for number, row in enumerate(rows):
            points = []
            for other in results.rows:
                is_same = (other.drafter, other.set, other.temperature) == (row.drafter, row.set, row.temperature)
                if is_same and other.width != "auto" and other.decode_speedup is not None:
                    low, high = other.decode_speedup_interval
                    value = other.decode_speedup
                    width = row.block_size if other.width == "full" else other.width
                    points.append((width, value, value - (low or value), (high or value) - value))
            lengths, values, below, above = zip(*sorted(points), strict=True) if points else ([], [], [], [])
            axes.errorbar(lengths, values, (below, above), fmt="s-", ms=5, color=f"C{number}", label=_label(row))
        axes.axhline(1, color=SOFT, lw=1)
        axes.set(xlabel="tokens verified at once")
        whole_ticks(axes)

    text = "Measured decode_speedup when only the first tokens of each draft are verified, with 95 % intervals."
    figures = panels(results.whole_blocks, draw, "decode_speedup")
    return Section("Speed against verification length", text, figures=figures)


def scatter(results: BenchResults) -> Section:
    """Draw one point a response."""

    def draw(axes, rows):
        for number, row in enumerate(rows):
            points = [
                (ours.published_tau, speedup)
                for ours, plain in zip(row.responses, row.plain_responses, strict=True)
                if ours.accepted_lengths and (speedup := ours.speedup_over(plain)) is not None
            ][:MAX_SCATTER]
            taus, speedups = [tau for tau, _ in points], [speedup for _, speedup in points]
            axes.scatter(taus, speedups, s=14, alpha=0.7, color=f"C{number}", label=_label(row))
        axes.axhline(1, color=SOFT, lw=1)
        axes.set(xlabel="tau of the response")

    text = "Each point is one response, decoded with whole drafts verified."
    return Section("Prompt by prompt", text, figures=panels(results.whole_blocks, draw, "decode_speedup"))


def _label(row: Row | ComparedRow) -> str:
    return label(f"{row.drafter}, T={row.temperature:g}")


def plot_acceptance(rows: Sequence[Row] | Sequence[ComparedRow], path: str | Path) -> None:
    """Draw the reach rate by slot, one panel a set, one line for each drafter and temperature.

    Args:
        rows: measured with whole drafts.
        path: of the PNG.
    """
    plt = pyplot()
    sets, drafters = list(dict.fromkeys(row.set for row in rows)), list(dict.fromkeys(row.drafter for row in rows))
    figure, axes = plt.subplots(
        1, len(sets), figsize=(4.6 * len(sets), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], sets, strict=True):
        for row in (row for row in rows if row.set == name):
            slots = range(1, len(row.reach_rate) + 1)
            style, color = "-" if row.temperature == 0 else "--", f"C{drafters.index(row.drafter)}"
            line = _label(row) + ("" if row.tau is None else f", tau {row.tau:.2f}")
            axis.plot(slots, row.reach_rate, style, marker="o", ms=3, color=color, label=line)
        axis.set(title=label(name), xlabel="slot", ylim=(0, 1.02), xticks=list(slots))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("reach rate (slots 1..k all accepted)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


OBJECTIVES = get_args(Objective)


def by_objective(logs: Mapping[str, list[dict]]) -> dict[str, list[list[dict]]]:
    """Group logs by the drafter's folder without its seed, in the order of `dpace.config.Objective`."""
    names = {name: name.partition("/")[0] for name in logs}
    known = {name: OBJECTIVES.index(name) for name in OBJECTIVES}
    order = sorted(dict.fromkeys(names.values()), key=lambda name: known.get(name.partition("+")[0], len(known)))
    return {group: [logs[name] for name in logs if names[name] == group] for group in order}


def tau_curves(logs: dict[str, list[dict]]) -> Section:
    """Draw tau of the validation responses against steps and against wall time, a line a drafter."""
    groups = by_objective(logs)

    def draw(axis, place: int) -> None:
        for number, (name, runs) in enumerate(groups.items()):
            curves = [_curve(log) for log in runs if any("eval_tau" in entry for entry in log)]
            for first, curve in enumerate(curves):
                named = label(name) if first == 0 else None
                axis.plot(curve[place], curve[2], marker="o", ms=3, color=SERIES[number % len(SERIES)], label=named)
        axis.set_xlabel("optimizer step" if place == 0 else "minutes of training steps")
        whole_ticks(axis)

    figures = draw_panels({"by steps": 0, "by time": 1}, draw, "tau, validation")
    text = "Measured on the validation share of the training prompts, which chooses the checkpoint."
    return Section("Training", text, figures=figures)


def _curve(log: Sequence[dict]) -> tuple[list[int], list[float], list[float]]:
    """Steps, minutes and taus of a log's evaluations."""
    seconds, clock, last = 0.0, {0: 0.0}, 0
    for entry in log:
        if "step_seconds" in entry:
            seconds += entry["step_seconds"] * (entry["step"] - last)
            last = entry["step"]
            clock[last] = seconds
    found = [entry for entry in log if "eval_tau" in entry]
    steps = [entry["step"] for entry in found]
    minutes = np.interp(steps, list(clock), list(clock.values())) / 60
    return steps, minutes.tolist(), [entry["eval_tau"] for entry in found]


def weights(logs: dict[str, list[dict]]) -> Section:
    """Draw each slot's share of the weight at a few moments, one panel a drafter (its first seed)."""
    content = {name: runs[0] for name, runs in by_objective(logs).items()}

    def draw(axis, log: list[dict]) -> None:
        _draw_moments(axis, log, MOMENTS)
        axis.set_xlabel("slot")

    text = (
        "Each slot's share of a block's weight, at up to five steps. D-PACE moves weight to later slots as the drafter "
        "gets better at the first ones; fixed schedules do not."
    )
    return Section("Weights over training", text, figures=draw_panels(content, draw, "share of the weight"))


def plot_weights(logs: Mapping[str, Sequence[dict]], path: str | Path) -> None:
    """Draw each slot's share of the weight at a few moments of training, one panel an objective.

    Args:
        logs: by drafter.
        path: of the PNG.

    Source: the weight-dynamics figure of D-PACE (arXiv 2605.18810).
    """
    figure, axes = pyplot().subplots(
        1, len(logs), figsize=(4.6 * len(logs), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    colors = [pyplot().get_cmap("viridis")(0.9 * i / (len(MOMENTS) - 1)) for i in range(len(MOMENTS))]
    for axis, (name, log) in zip(axes[0], logs.items(), strict=True):
        _draw_moments(axis, log, colors)
        axis.set(title=label(name), xlabel="slot")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("share of the block's weight")
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def _draw_moments(axis, log: Sequence[dict], colors: Sequence) -> None:
    """Draw each slot's share of the weight at as many moments of a training log as there are colors."""
    entries = [entry for entry in log if "weight_share/1" in entry]
    last = len(colors) - 1
    chosen = sorted({round(i * (len(entries) - 1) / last) for i in range(len(colors))}) if entries else []
    for number, entry in enumerate(entries[i] for i in chosen):
        slots = sorted(int(key[13:]) for key in entry if re.fullmatch(r"weight_share/\d{1,4}", key))
        shares = [entry[f"weight_share/{slot}"] for slot in slots]
        color = colors[round(number * last / max(1, len(chosen) - 1))]
        axis.plot(slots, shares, marker="o", ms=3, color=color, label=f"step {entry['step']}")
        whole_ticks(axis, slots)


def plot_tau(logs: Mapping[str, Sequence[Sequence[dict]]], path: str | Path) -> None:
    """Draw tau of the validation responses against steps: the mean over seeds, and a thin line a seed.

    Args:
        logs: by objective, one for each seed.
        path: of the PNG.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (name, runs) in enumerate(logs.items()):
        curves = [{e["step"]: e["eval_tau"] for e in run if "eval_tau" in e} for run in runs]
        for curve in curves:
            axis.plot(list(curve), list(curve.values()), color=f"C{number}", alpha=0.25, lw=1)
        steps = sorted(set.intersection(*map(set, curves)))
        means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
        axis.plot(steps, means, color=f"C{number}", marker="o", ms=3, label=label(name))
    axis.set(xlabel="optimizer step", ylabel="tau, validation responses")
    whole_ticks(axis)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
