"""Plots of results, for the page and as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpace.measure.results import BenchResults
from dpace.measure.rows import ComparedRow, Prediction, Row
from dpace.report.figures import SOFT, Section, label, panels, pyplot, whole_ticks

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
    """Draw speed against verification length, predicted for one prompt at a time, and what was measured."""
    predictions = [p for p in results.predictions if p.concurrency == 1]

    def draw(axes, rows):
        for number, row in enumerate(rows):
            key = (row.drafter, row.set, row.temperature)
            for p in (p for p in predictions if (p.drafter, p.set, p.temperature) == key):
                axes.plot(p.widths, p.speedups, color=f"C{number}", label=f"{_label(row)}, predicted")
            for other in results.rows:
                (low, high), value = other.decode_speedup_interval, other.decode_speedup
                if (other.drafter, other.set, other.temperature) != key or other.width == "auto" or value is None:
                    continue
                error = None if low is None or high is None else [[max(0, value - low)], [max(0, high - value)]]
                width = row.block_size if other.width == "full" else other.width
                what = "measured" if other is row and number == 0 else None
                axes.errorbar([width], [value], error, fmt="s", ms=5, color=f"C{number}", capsize=3, label=what)
        axes.axhline(1, color=SOFT, lw=1)
        axes.set(xlabel="tokens verified at once")
        whole_ticks(axes)

    text = (
        "The lines predict decode_speedup when only the first tokens of each draft are verified. They follow from the "
        "accepted lengths of whole drafts, and from the time that a step of each length takes on this machine. The "
        "squares were measured."
    )
    text += describe_errors(predictions)
    figures = panels(results.whole_blocks, draw, "decode_speedup")
    return Section("Speed against verification length", text, figures=figures)


def describe_errors(predictions: Sequence[Prediction], what: str = "predictions") -> str:
    """Say how far off predictions were; empty where none was checked.

    Whole drafts of one prompt do not count: the other predictions are derived from them.
    """
    errors = [
        abs(predicted / found - 1)
        for p in predictions
        for width, predicted, found in zip(p.widths, p.speedups, p.measured, strict=True)
        if found and (p.concurrency > 1 or width < p.widths[-1])
    ]
    if not errors:
        return ""
    return (
        f" The {len(errors)} {what} that were also measured are off by {np.mean(errors):.1%} on average, "
        f"{max(errors):.1%} at most."
    )


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
