"""Plots of training logs, for the page and as PNG files.

A log is the `log_history` of `trainer_state.json`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dpace.report.figures import Section, label, pyplot, svg

MAX_DRAFTERS = 4
"""Drafters whose weights are drawn on the page."""


def tau_curves(logs: dict[str, list[dict]]) -> Section:
    """Draw tau of the validation responses against steps and against wall time."""
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
            axis.plot(x, taus, marker="o", ms=3, color=f"C{number % 10}", label=label(name))
    for axis, words in zip(axes, ("optimizer step", "minutes of training steps"), strict=True):
        axis.set_xlabel(words)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tau, validation")
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    text = "Measured on the validation share of the training prompts, which chooses the checkpoint."
    return Section("Training", text, figure=svg(figure))


def weights(logs: dict[str, list[dict]]) -> Section:
    """Draw each slot's share of the weight at a few moments, one panel a drafter, for the first four."""
    figure = _draw_weights(dict(list(logs.items())[:MAX_DRAFTERS]))
    text = "D-PACE moves weight to later slots as the drafter gets better at the first ones; fixed schedules do not."
    return Section("Weights over training", text, figure=svg(figure))


def plot_weights(logs: Mapping[str, Sequence[dict]], path: str | Path) -> None:
    """Draw each slot's share of the weight at a few moments of training, one panel an objective.

    Args:
        logs: by drafter.
        path: of the PNG.

    Source: the weight-dynamics figure of D-PACE (arXiv 2605.18810).
    """
    figure = _draw_weights(logs)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def _draw_weights(logs: Mapping[str, Sequence[dict]]):
    """The figure of `plot_weights`."""
    figure, axes = pyplot().subplots(
        1, len(logs), figsize=(4.6 * len(logs), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, log) in zip(axes[0], logs.items(), strict=True):
        _draw_moments(axis, log)
        axis.set(title=label(name), xlabel="slot")
    axes[0][0].set_ylabel("share of the block's weight")
    return figure


def _draw_moments(axis, log: Sequence[dict]) -> None:
    """Draw each slot's share of the weight at five moments of a training log."""
    entries = [entry for entry in log if "weight_share/1" in entry]
    chosen = sorted({round(i * (len(entries) - 1) / 4) for i in range(5)}) if entries else []
    for number, entry in enumerate(entries[i] for i in chosen):
        slots = sorted(int(key[13:]) for key in entry if re.fullmatch(r"weight_share/\d{1,4}", key))
        color = pyplot().get_cmap("viridis")(number / max(1, len(chosen) - 1) * 0.9)
        shares = [entry[f"weight_share/{slot}"] for slot in slots]
        axis.plot(slots, shares, marker="o", ms=3, color=color, label=f"step {entry['step']}")
        axis.set_xticks(slots)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


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
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
