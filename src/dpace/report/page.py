"""results.json files and training logs in; one HTML page without network, and the same as Markdown, out."""

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dpace.report.tables import (
    PAIR_HEADINGS,
    RESULT_HEADINGS,
    SERVER_HEADINGS,
    acceptance_of,
    copied_note,
    pair_cells,
    percent,
    prediction_cells,
    pyplot,
    result_cells,
    server_cells,
    verdict,
    weight_moments,
    whole_blocks,
    with_interval,
)

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


def write_report(folders: Sequence[str | Path], path: str | Path) -> list[Path]:
    """Write the page and, beside it with the suffix `.md`, the same as Markdown.

    Args:
        folders: of `dpace demo`, `bench` or `compare`; each has a results.json, and may have drafters with their training logs.
        path: of the HTML file.

    Returns:
        The files written.

    Raises:
        ValueError: a folder without results.json, or one that cannot be read.
    """
    sections = [section for folder in folders for section in read_folder(Path(folder))]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = _template().render(sections=sections, title=sections[0].text)
    path.write_text(page, encoding="utf-8")
    markdown = path.with_suffix(".md")
    markdown.write_text(to_markdown(sections), encoding="utf-8")
    return [path, markdown]


def read_folder(folder: Path) -> list[Section]:
    """All that a folder has to show."""
    found = [path for path in (folder / "results.json", folder / "servers.json") if path.exists()]
    if not found:
        raise ValueError(f"{folder} has no results.json or servers.json; `dpace demo`, `bench` and `compare` write one")
    sections = []
    for path in found:
        try:
            results = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read {path} ({error}); measure again") from error
        sections += [servers(results)] if path.name == "servers.json" else _sections(results, folder)
    return sections


def _sections(results: dict, folder: Path) -> list[Section]:
    logs = {
        str(found.parent.relative_to(folder)): json.loads(found.read_text())["log_history"]
        for found in sorted(folder.glob("*/trainer_state.json")) + sorted(folder.glob("*/seed-*/trainer_state.json"))
    }
    is_comparison = "baseline" in results
    benchmark = results.get("decode") if is_comparison else results
    sections = [comparison(results)] if is_comparison else []
    if benchmark:
        sections += [
            headline(benchmark),
            speeds(benchmark),
            *([paired(benchmark)] if benchmark.get("comparisons") else []),
            slots(benchmark),
            lengths(benchmark),
            widths(benchmark),
            *(
                [concurrency(benchmark)]
                if len({p["concurrency"] for p in benchmark.get("predictions", ())}) > 1
                else []
            ),
            scatter(benchmark),
            *examples(benchmark),
        ]
    if logs:
        sections += [tau_curves(logs), weights(logs)]
    sections.append(provenance(benchmark or results, folder))
    return sections


def headline(results: dict) -> Section:
    """One sentence a set: what a user gets."""
    target = Path(results["target"]).name
    lines = []
    for name in dict.fromkeys(row["set"] for row in results["rows"]):
        of_set = [row for row in results["rows"] if row["set"] == name and row["temperature"] == 0]
        if not of_set:
            continue
        as_used = [row for row in of_set if row["width"] == "auto"] or of_set  # not the best of all that was tried
        best = max(as_used, key=lambda row: row["decode_speedup"])
        found = {"pays": "faster", "slower": "not faster"}.get(
            verdict(best["decode_speedup_interval"]), "no clear gain"
        )
        speed = with_interval(best["decode_speedup"], best["decode_speedup_interval"])
        lines.append(
            f"{name}: {found}, decode_speedup {speed} with {best['drafter']}, width {best['width']}, at temperature 0"
            + (f" ({share:.0%} of the tokens copied from the text)" if (share := best.get("share_copied")) else "")
        )
    same, total = (sum(row[key] for row in results["rows"]) for key in ("num_same_text", "num_responses"))
    lines.append(f"{same} of {total} responses are the target's own text, token for token")
    return Section(f"Decoding {target}", ". ".join(lines) + ".")


def speeds(results: dict) -> Section:
    """The table by set and temperature."""
    return Section(
        "Speed",
        "tau: tokens emitted by a pass of the target, pooled over verifications; with width auto also passes without a draft"
        + copied_note(results["rows"], start="; ")
        + ". "
        "decode_speedup: ratio of total tokens a second with and without the drafter, prefill excluded. In brackets 95 % intervals, "
        "bootstrap over prompts. Starred columns are the definitions of published tables: mean over responses of their means, ratio of "
        "mean seconds a token.",
        [list(RESULT_HEADINGS), *(result_cells(row) for row in results["rows"])],
    )


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
    text += _errors(predictions)
    return Section("Speed against verify width", text, figure=_panels(whole_blocks(results), draw, "decode_speedup"))


def _errors(predictions: Sequence[dict], what: str = "predictions") -> str:
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


def concurrency(results: dict) -> Section:
    """Predicted speed with several prompts at once."""
    head = ["set", "T", "drafter", "at once", *map(str, results["predictions"][0]["widths"]), "best"]
    text = "Predicted decode_speedup by tokens verified at once, over plain decoding of as many prompts; measured ones in parentheses."
    return Section(
        "Prompts at once",
        text + _errors([p for p in results["predictions"] if p["concurrency"] > 1], "predictions for several prompts"),
        [head, *(prediction_cells(p) for p in results["predictions"])],
    )


def paired(results: dict) -> Section:
    """Drafters against the first one."""
    rows = [list(PAIR_HEADINGS), *(pair_cells(row) for row in results["comparisons"])]
    title = f"Against {results['comparisons'][0]['baseline']}"
    return Section(title, "On the same prompts, 95 % intervals of the paired difference.", rows)


def servers(results: dict) -> Section:
    """The table of a benchmark of running servers."""
    names = ", ".join(f"{side}: {server['engine']}" for side, server in results["servers"].items())
    return Section(
        f"Servers, {Path(results['target']).name}",
        f"{names}. tau as the server reports it; tokens a second of a request after its first token; throughput with prompts read, all "
        "requests together; seconds to the first token, median and 95th percentile.",
        [list(SERVER_HEADINGS), *(server_cells(row) for row in results["rows"])],
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


def examples(results: dict) -> list[Section]:
    """The fastest and the slowest response of each set, with what came from the drafter."""
    chosen = []
    for row in whole_blocks(results):
        if row["temperature"] == 0 and row["drafter"] == results["rows"][0]["drafter"]:
            chosen += [{**example, "set": row["set"]} for example in row.get("examples", ())]
    if not chosen:
        return []
    text = "Marked text came from the drafter and was accepted, one mark a verification; the rest is the target's own next token."
    return [Section("Best and slowest responses", text, examples=chosen)]


def comparison(results: dict) -> Section:
    """The table of `dpace compare`."""
    rows = [["set", "objective", "tau", f"over {results['baseline']}", "by seed"]]
    for row in results["rows"]:
        is_baseline = row["drafter"] == results["baseline"]
        rows.append(
            [
                row["set"],
                row["drafter"],
                with_interval(row["tau"], row["tau_interval"]),
                "" if is_baseline else percent(row["gain"]),
                "" if is_baseline else " ".join(f"{100 * x:+.1f}" for x in row["gain_by_seed"]),
            ]
        )
    seeds = ", ".join(map(str, results["seeds"]))
    return Section(
        f"Objectives, {Path(results['target']).name}",
        f"tau on held-out prompts at temperature 0, reduction {results['reduction']}, seeds {seeds}; intervals by paired bootstrap "
        "over prompts and seeds.",
        rows,
    )


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


def provenance(results: dict, folder: Path) -> Section:
    """What made the numbers."""
    kept = {
        key: results[key]
        for key in ("dtype", "engine", "seed", "max_new_tokens", "hardware", "versions")
        if key in results
    }
    rows = [["", ""], ["folder", str(folder)], ["target", results["target"]]]
    for key, value in kept.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        rows.append([key, text])
    drafters = results.get("drafters", {})
    rows += [[f"sha256 of {name}", value[:16]] for name, value in (drafters.items() if drafters else ())]
    return Section("Provenance", "", rows)


def to_markdown(sections: Sequence[Section]) -> str:
    """Headings, texts and tables; figures are only in the page."""
    lines = []
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        if section.rows:
            head, *body = section.rows
            lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
        for example in section.examples:
            text = "".join(f"[{piece}]" if is_draft else piece for piece, is_draft in example["pieces"])
            lines += [f"{example['set']}, {example['what']}: {example['id']}, tau {example['tau']:.2f}", ""]
            lines += ["    " + line for line in text.splitlines()] + [""]
    return "\n".join(lines)


def _template():
    import jinja2

    source = (files("dpace") / "report" / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source)


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
