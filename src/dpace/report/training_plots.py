"""Plots of training logs, for the page and as PNG files.

A log is the `log_history` of `trainer_state.json`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from dpace.config import Objective
from dpace.report.figures import MOMENTS, SERIES, Section, draw_panels, label, pyplot, whole_ticks

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
