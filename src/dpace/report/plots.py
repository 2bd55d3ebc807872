"""Plots of results and training logs."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpace.measure.results import acceptance_of, whole_blocks

MAX_SCATTER = 400
"""Prompts of a set that are drawn."""


@dataclass(frozen=True)
class Section:
    """A heading, what to read from it, and a table or a figure."""

    title: str
    text: str
    rows: Sequence[Sequence[str]] = ()
    """The first row holds the headings; the first column is text."""
    figure: str = ""
    """SVG."""
    examples: Sequence[dict] = ()
    """Responses as `dpace.measure.benchmark` keeps them, `pieces` of text and whether they were drafted."""


def slots(results: dict) -> Section:
    """Acceptance by slot with intervals."""

    def draw(axes, rows):
        for number, row in enumerate(rows):
            acceptance = acceptance_of(row)
            slot = np.arange(1, acceptance.block_size)
            low, high = acceptance.reach_interval()
            label = f"{row['drafter']}, T={row['temperature']:g}"
            axes.plot(slot, acceptance.reach_rate, marker="o", ms=3, color=f"C{number}", label=label)
            axes.fill_between(slot, low, high, color=f"C{number}", alpha=0.15, lw=0)
        axes.set(xlabel="slot", ylim=(0, 1.02))
        axes.legend(fontsize=8)

    text = "Share of verifications of whole drafts that accepted slots 1 to k, with 95 % intervals over prompts."
    return Section("Acceptance by slot", text, figure=_panels(whole_blocks(results), draw, "reach rate"))


def lengths(results: dict) -> Section:
    """Histogram of accepted lengths."""

    def draw(axes, rows):
        for number, row in enumerate(rows):
            counts = np.array(row["histogram"], float)
            place = np.arange(len(counts)) + (number - (len(rows) - 1) / 2) * 0.8 / len(rows)
            label = f"{row['drafter']}, T={row['temperature']:g}"
            axes.bar(place, counts / counts.sum(), 0.8 / len(rows), color=f"C{number}", label=label)
        axes.set(xlabel="accepted draft tokens", xticks=range(len(rows[0]["histogram"])))
        axes.legend(fontsize=8)

    text = "How many draft tokens a verification of a whole draft accepted."
    return Section("Accepted lengths", text, figure=_panels(whole_blocks(results), draw, "share of verifications"))


def widths(results: dict) -> Section:
    """Speed against verify width, predicted for one prompt at a time, and what was measured."""
    predictions = [p for p in results.get("predictions", ()) if p["concurrency"] == 1]

    def draw(axes, rows):
        for number, row in enumerate(rows):
            key = (row["drafter"], row["set"], row["temperature"])
            for p in (p for p in predictions if (p["drafter"], p["set"], p["temperature"]) == key):
                label = f"{row['drafter']}, T={row['temperature']:g}, predicted"
                axes.plot(p["widths"], p["speedups"], color=f"C{number}", label=label)
            for other in results["rows"]:
                if (other["drafter"], other["set"], other["temperature"]) != key or other["width"] == "auto":
                    continue
                (low, high), value = other["decode_speedup_interval"], other["decode_speedup"]
                error = None if low is None else [[max(0, value - low)], [max(0, high - value)]]
                width = row["block_size"] if other["width"] == "full" else other["width"]
                label = "measured" if other is row else None
                axes.errorbar([width], [value], error, fmt="s", ms=5, color=f"C{number}", capsize=3, label=label)
        axes.axhline(1, color="0.5", lw=1)
        axes.set(xlabel="tokens verified at once")
        axes.legend(fontsize=8)

    text = (
        "decode_speedup if only the first tokens of a draft are verified, predicted from the accepted lengths and seconds of whole drafts and "
        "from how the time of a step on this machine grows with the width; and what was measured."
    )
    text += describe_errors(predictions)
    return Section("Speed against verify width", text, figure=_panels(whole_blocks(results), draw, "decode_speedup"))


def describe_errors(predictions: Sequence[dict], what: str = "predictions") -> str:
    """How far off they were; whole drafts of one prompt are what the others are derived from, and do not count."""
    errors = [
        abs(predicted / found - 1)
        for p in predictions
        for width, predicted, found in zip(p["widths"], p["speedups"], p["measured"], strict=True)
        if found is not None and (p["concurrency"] > 1 or width < p["widths"][-1])
    ]
    if not errors:
        return ""
    return (
        f" The {len(errors)} {what} that were measured too are off by {np.mean(errors):.1%} on average, "
        f"{max(errors):.1%} at most."
    )


def scatter(results: dict) -> Section:
    """One point a prompt."""

    def draw(axes, rows):
        for number, row in enumerate(rows):
            points = [
                (np.mean(ours["accepted_lengths"]) + 1, _speedup(ours, plain))
                for ours, plain in zip(row["responses"], row["plain_responses"], strict=True)
                if ours["accepted_lengths"] and plain["decode_tokens"]
            ][:MAX_SCATTER]
            label = f"{row['drafter']}, T={row['temperature']:g}"
            axes.scatter(*zip(*points, strict=True), s=14, alpha=0.7, color=f"C{number}", label=label)
        axes.axhline(1, color="0.5", lw=1)
        axes.set(xlabel="tau of the response")
        axes.legend(fontsize=8)

    text = "Each point is a response, whole drafts verified."
    return Section("Prompt by prompt", text, figure=_panels(whole_blocks(results), draw, "decode_speedup"))


def tau_curves(logs: dict[str, list[dict]]) -> Section:
    """Tau of the validation responses against steps and against wall time."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for number, (name, log) in enumerate(logs.items()):
        seconds, clock, last = 0.0, {0: 0.0}, 0
        for entry in log:
            if "step_seconds" in entry:
                seconds += entry["step_seconds"] * (entry["step"] - last)
                last = entry["step"]
                clock[last] = seconds
        points = [(entry["step"], entry["eval_tau"]) for entry in log if "eval_tau" in entry]
        if not points:
            continue
        steps, taus = zip(*points, strict=True)
        minutes = np.interp(steps, list(clock), list(clock.values())) / 60
        for axis, x in zip(axes, (steps, minutes), strict=True):
            axis.plot(x, taus, marker="o", ms=3, color=f"C{number % 10}", label=name)
    for axis, label in zip(axes, ("optimizer step", "minutes of training steps"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tau, validation")
    axes[0].legend(fontsize=8)
    text = "Measured on the validation share of the training prompts, which chooses the checkpoint."
    return Section("Training", text, figure=_svg(figure))


def weights(logs: dict[str, list[dict]]) -> Section:
    """Each slot's share of the weight at a few moments, one panel a drafter, the first four."""
    plt = pyplot()
    chosen = list(logs.items())[:4]
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(4.5 * len(chosen), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, log) in zip(axes[0], chosen, strict=True):
        weight_moments(axis, log)
        axis.set(title=name, xlabel="slot")
    axes[0][0].set_ylabel("share of the block's weight")
    text = "D-PACE moves weight to later slots as the drafter gets better at the first ones; fixed schedules do not."
    return Section("Weights over training", text, figure=_svg(figure))


def _panels(rows: Sequence[dict], draw: Callable[[Any, list[dict]], None], ylabel: str) -> str:
    """A figure with one panel a set."""
    plt = pyplot()
    names = list(dict.fromkeys(row["set"] for row in rows))
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.5 * columns, 3.4 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        draw(axis, [row for row in rows if row["set"] == name])
        axis.set_title(name)
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel(ylabel)
    return _svg(figure)


def _svg(figure) -> str:
    """The figure as SVG that scales with the page."""
    buffer = io.StringIO()
    with pyplot().rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpace"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _speedup(ours: dict, plain: dict) -> float:
    return (ours["decode_tokens"] / ours["decode_seconds"]) / (plain["decode_tokens"] / plain["decode_seconds"])


def plot_acceptance(results: dict, path: str | Path) -> None:
    """Draw the reach rate by slot, one panel a set, one line for each drafter and temperature."""
    plt = pyplot()
    rows = whole_blocks(results)
    sets, drafters = (list(dict.fromkeys(row[key] for row in rows)) for key in ("set", "drafter"))
    figure, axes = plt.subplots(
        1, len(sets), figsize=(4.6 * len(sets), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], sets, strict=True):
        for row in (row for row in rows if row["set"] == name):
            slots = range(1, len(row["reach_rate"]) + 1)
            style = "-" if row["temperature"] == 0 else "--"
            label = f"{row['drafter']}, T={row['temperature']:g}, tau {row['tau']:.2f}"
            axis.plot(
                slots,
                row["reach_rate"],
                style,
                marker="o",
                ms=3,
                color=f"C{drafters.index(row['drafter'])}",
                label=label,
            )
        axis.set(title=name, xlabel="slot", ylim=(0, 1.02), xticks=list(slots))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("reach rate (slots 1..k all accepted)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_weights(logs: dict[str, Sequence[dict]], path: str | Path) -> None:
    """Draw each slot's share of the weight at a few moments of training, one panel an objective.

    Args:
        logs: the `log_history` of `trainer_state.json`, by drafter.
        path: of the PNG.

    Source: the weight-dynamics figure of D-PACE (arXiv 2605.18810).
    """
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(logs), figsize=(4.6 * len(logs), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, log) in zip(axes[0], logs.items(), strict=True):
        weight_moments(axis, log)
        axis.set(title=name, xlabel="slot")
    axes[0][0].set_ylabel("share of the block's weight")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def weight_moments(axis, log: Sequence[dict]) -> None:
    """Draw each slot's share of the weight at five moments of a training log."""
    entries = [entry for entry in log if "weight_share/1" in entry]
    chosen = sorted({round(i * (len(entries) - 1) / 4) for i in range(5)}) if entries else []
    for number, entry in enumerate(entries[i] for i in chosen):
        slots = range(1, 1 + sum(key.startswith("weight_share/") for key in entry))
        color = pyplot().get_cmap("viridis")(number / max(1, len(chosen) - 1) * 0.9)
        shares = [entry[f"weight_share/{slot}"] for slot in slots]
        axis.plot(slots, shares, marker="o", ms=3, color=color, label=f"step {entry['step']}")
        axis.set_xticks(slots)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plot_tau(logs: Mapping[str, Sequence[Sequence[dict]]], path: str | Path) -> None:
    """Draw tau of the validation responses against steps, one line an objective (mean over seeds) and a thin one a seed.

    Args:
        logs: by objective, the `log_history` of each seed.
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
        axis.plot(steps, means, color=f"C{number}", marker="o", ms=3, label=name)
    axis.set(xlabel="optimizer step", ylabel="tau, validation responses")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pyplot():
    """Matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
