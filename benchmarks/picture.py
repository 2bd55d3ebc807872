"""Draw the README's picture from the results of the demo: tokens a second, and acceptance by position.

    python benchmarks/picture.py dpace-demo docs/picture.svg [dpace-compare]

With the folder of `dpace compare demo-cpu`, acceptance is that of all its seeds. The SVG has one set of colors for
light pages and one for dark ones.
"""

import sys
from pathlib import Path

import numpy as np

from dpace.measure.results import BenchResults, CompareResults, read_results
from dpace.report.plots import SERIES, drawing, svg, whole_ticks
from dpace.studies.compare import ALL_SETS

SAME = "--series-7: #8a9097; background: var(--page);"
LIGHT = "--page: #fff; --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --series-0: #1f6fb4; --series-1: #d9650a;"
DARK = "--page: #14171a; --ink: #e8eaed; --soft: #a3acb5; --line: #363d44; --series-0: #62b0f0; --series-1: #ff9d4d;"
STYLE = f"<style>:root {{ {LIGHT} {SAME} }} @media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}</style>"
PLAIN, DPACE, DFLASH = SERIES[7], SERIES[0], SERIES[1]
OBJECTIVES = {"dpace": ("D-PACE", DPACE, "-"), "dflash": ("DFlash's decay", DFLASH, "--")}


def draw_speeds(axis, results: BenchResults) -> None:
    """Draw tokens a second without a drafter, and with D-PACE's as `dpace generate` uses it, a pair of bars a set."""
    rows = [r for r in results.rows if (r.drafter, r.width, r.temperature) == ("dpace", "auto", 0)]
    place = np.arange(len(rows))
    sides = [
        ([row.plain_tokens_per_second for row in rows], PLAIN, "without a drafter"),
        ([row.tokens_per_second for row in rows], DPACE, "with the D-PACE drafter"),
    ]
    for number, (values, color, name) in enumerate(sides):
        bars = axis.bar(place + (number - 0.5) * 0.38, values, 0.36, color=color, label=name)
        axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.set_xticks(place, [row.set for row in rows])
    axis.set(ylabel="tokens a second", title="Speed, the same text")
    axis.margins(y=0.35)  # room for the legend


def draw_positions(axis, results: CompareResults) -> None:
    """Draw the share of drafts whose first tokens are all accepted, a line for each objective and set."""
    for row in results.rows:
        if row.set != ALL_SETS and row.drafter in OBJECTIVES:
            name, color, line = OBJECTIVES[row.drafter]
            slots = range(1, row.block_size)
            axis.plot(slots, row.reach_rate, line, marker="o", ms=3.5, color=color, label=name)
            if row.drafter == "dpace":
                axis.annotate(row.set, (2, row.reach_rate[1]), (4, 6), textcoords="offset points")
            whole_ticks(axis, slots)
    axis.set(xlabel="position in the draft", ylabel="accepted up to here", title="Whole drafts", ylim=(0, 1))


def main(folder: str, path: str, seeds: str = "") -> None:
    """Write the picture."""
    results, compared = (read_results(Path(place) / "results.json") for place in (folder, seeds or folder))
    if not isinstance(results, CompareResults) or results.decode is None:
        sys.exit(f"{folder} has no results of `dpace demo`")
    if not isinstance(compared, CompareResults):
        sys.exit(f"{seeds} has no results of `dpace compare`")
    with drawing() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
        draw_speeds(axes[0], results.decode)
        draw_positions(axes[1], compared)
        for axis in axes:
            axis.grid(alpha=0.6, axis="y")
            named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
            axis.legend(named.values(), named.keys(), loc="upper right")
        text = svg(figure)
    head, end, body = text.partition(">")
    Path(path).write_text(head + end + STYLE + body)
    print(f"written: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
