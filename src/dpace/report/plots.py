"""Draw training from its logs: each drawing is one SVG, with a panel for each quantity or objective."""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpace.system.groups import spread_evenly
from dpace.system.ledger import JsonObject
from dpace.system.progress import shorten

MAX_COLUMNS = 3
"""Panels that stand side by side."""
MAX_MOMENTS = 5
"""Steps of training at which weights are shown."""
SHARE = "weight_share/"
"""What a key of a log begins with, before the slot."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpace",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.marker": "o",
    "lines.markersize": 3,
    # Equal curves show through the gaps of those that are drawn over them.
    "axes.prop_cycle": "cycler('linestyle', ['-', '--', '-.', ':', (0, (1, 4))])",
    "legend.frameon": False,
}
Logs = Mapping[str, Sequence[Sequence[JsonObject]]]
"""Training logs by objective, one for each seed."""


def training_curves(logs: Logs) -> str:
    """Draw the loss, and tau of the validation responses, against steps; a line for each drafter.

    A single value is not drawn.
    """

    def draw(axis: Any, key: str) -> None:
        for number, (name, runs) in enumerate(logs.items()):
            for log in runs:
                entries = [entry for entry in log if key in entry]
                steps = [entry["step"] for entry in entries]
                axis.plot(steps, [entry[key] for entry in entries], color=f"C{number}", label=label(name))
                axis.set_visible(len(steps) > 1)
        axis.set(xlabel="optimizer step")

    return draw_panels({"loss": "loss", "tau, validation": "eval_tau"}, draw, same_scale=False)


def slot_weights(logs: Logs) -> str:
    """Draw each slot's share of the weight at a few moments of training, a panel for each objective (its first seed).

    Source: the weight-dynamics figure of D-PACE (arXiv 2605.18810).
    """
    from matplotlib import colormaps

    def draw(axis: Any, runs: Sequence[Sequence[JsonObject]]) -> None:
        # The log of the first seed; entries of tau have no shares.
        entries = [entry for entry in runs[0] if f"{SHARE}1" in entry]
        chosen = spread_evenly(entries, MAX_MOMENTS)
        for number, entry in enumerate(chosen, start=1):
            slots = sorted(int(key.removeprefix(SHARE)) for key in entry if key.startswith(SHARE))
            shares = [entry[f"{SHARE}{slot}"] for slot in slots]
            # Later steps are darker, and the first one can still be seen on white.
            color = colormaps["Greys"](0.2 + 0.8 * number / len(chosen))
            axis.plot(slots, shares, color=color, label=f"step {entry['step']:g}")
        axis.set(xlabel="slot", ylabel="share of the weight")

    return draw_panels(logs, draw)


DRAWINGS = (
    (
        "Training",
        "Losses of different objectives have different scales; tau can be compared. It is measured on the validation "
        "share of the training prompts, and chooses the checkpoint. The loss jumps where blocks "
        "grow. A tau that was measured once is in trainer_state.json.",
        training_curves,
    ),
    (
        "Weights over training",
        "Each slot's share of a block's weight, at up to five steps. D-PACE moves weight to later slots as the drafter "
        "gets better at the first ones; fixed schedules do not.",
        slot_weights,
    ),
)
"""Title, text and function of each drawing, in the order of the page."""


def draw_panels(content: Mapping[str, Any], draw: Callable[[Any, Any], None], *, same_scale: bool = True) -> str:
    """Draw one panel for each title, and one legend; as an SVG element.

    Args:
        content: by title, what `draw` gets beside the axes.
        draw: called for each panel; its artists' labels make the legend.
        same_scale: whether the panels have one vertical axis.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = min(len(content), MAX_COLUMNS)
    height = math.ceil(len(content) / width)
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only the width of a name is then a guess
        figure = Figure(figsize=(4.2 * width, 3.1 * height + 0.4), layout="constrained")
        axes = figure.subplots(height, width, sharey=same_scale, squeeze=False).ravel()
        legend = {}  # lines by label: what several panels have is there once
        for axis, (title, values) in zip(axes, content.items(), strict=False):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            draw(axis, values)
            axis.set_title(label(title))
            lines, names = axis.get_legend_handles_labels()
            legend |= zip(names, lines, strict=True)
        for axis in axes[len(content) :]:  # the last row may have free places
            axis.remove()
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=width + 1)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # Without the XML declaration and the doctype, which stand in no HTML page.
    return text[text.index("<svg") :]


def label(text: str) -> str:
    """Write a name that a figure shows as it is; the space keeps matplotlib from hiding one with a first underscore."""
    return f" {shorten(text, 80)}"
