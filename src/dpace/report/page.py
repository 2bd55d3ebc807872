"""results.json files and training logs in; one HTML page without network, and the same as Markdown, out."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from dpace.measure.results import whole_blocks
from dpace.report.plots import Section, describe_errors, lengths, scatter, slots, tau_curves, weights, widths
from dpace.report.tables import (
    PAIR_HEADINGS,
    RESULT_HEADINGS,
    SERVER_HEADINGS,
    copied_note,
    pair_cells,
    percent,
    prediction_cells,
    result_cells,
    server_cells,
    verdict,
    with_interval,
)


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


def concurrency(results: dict) -> Section:
    """Predicted speed with several prompts at once."""
    head = ["set", "T", "drafter", "at once", *map(str, results["predictions"][0]["widths"]), "best"]
    text = "Predicted decode_speedup by tokens verified at once, over plain decoding of as many prompts; measured ones in parentheses."
    return Section(
        "Prompts at once",
        text
        + describe_errors(
            [p for p in results["predictions"] if p["concurrency"] > 1], "predictions for several prompts"
        ),
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
