"""Write results and training logs as one HTML page that needs no network, and as Markdown."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from dpace.flags import command
from dpace.ledger import claim, hold, refuse_others, write_text
from dpace.measure.results import BenchResults, CompareResults, Results, ServerResults, find_results, read_log
from dpace.progress import printable
from dpace.report.contexts import says_more
from dpace.report.figures import Section
from dpace.report.markdown import as_code, as_markdown
from dpace.report.plots import lengths, scatter, slots, widths
from dpace.report.sections import (
    comparison,
    concurrency,
    contexts,
    examples,
    headline,
    heldout,
    paired,
    provenance,
    servers,
    speeds,
)
from dpace.report.training_plots import tau_curves, weights


def write_report(folders: Sequence[str | Path], path: str | Path) -> list[Path]:
    """Write the page and, beside it with the suffix `.md`, the Markdown.

    Args:
        folders: of `dpace demo`, `bench` or `compare`; each has a results.json or servers.json, and may have drafters
            with their training logs.
        path: of the HTML file.

    Returns:
        The files written.

    Raises:
        ValueError: a folder without results, or with a file that is not what this version writes; a page or Markdown
            there that dpace did not write; or another process is writing to that folder.
        OSError: a file that cannot be read or written.
    """
    path = Path(path)
    markdown = _check_path(path)
    found = [(results, Path(folder)) for folder in folders for results in find_results(Path(folder))]
    sections = [section for results, folder in found for section in sections_of(results, folder)]
    benchmarks = [b for results, _ in found if (b := benchmark_of(results))]
    if says_more(benchmarks):
        sections.insert(1, contexts(benchmarks))
    targets = dict.fromkeys(Path(results.target).name for results, _ in found)
    title = f"Drafters for {', '.join(targets)}"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    called = command("report", *folders, output=path)
    page = _template().render(sections=sections, title=title, date=date, command=called)
    about = f"Written on {date} by `{as_code(called)}`."
    with hold(path.parent):
        claim(path.parent, path.name, markdown.name)
        write_text(path, page)
        write_text(markdown, "\n".join([f"# {as_markdown(title)}", "", about, "", to_markdown(sections)]))
    return [path, markdown]


def _check_path(path: Path) -> Path:
    """Refuse a place that the page cannot have, before anything is read; give the Markdown's place."""
    if "\0" in str(path):
        raise ValueError("the output has a character that no file's name has; name an HTML file with --output")
    if path.is_dir() or not path.name or path.suffix == ".md":
        what = "is a folder" if path.is_dir() else "is where the Markdown would be" if path.name else "is no file"
        raise ValueError(f"the output {path} {what}; name an HTML file with --output, such as report.html")
    markdown = path.with_suffix(".md")
    refuse_others(path.parent, path.name, markdown.name)
    return markdown


def sections_of(results: Results, folder: Path) -> list[Section]:
    """Make all that results, and the training logs beside them, have to show."""
    if isinstance(results, ServerResults):
        return [servers(results)]
    sections = [comparison(results)] if isinstance(results, CompareResults) else []
    benchmark = benchmark_of(results)
    if benchmark:
        sections += _benchmark(benchmark)
    paths = [*sorted(folder.glob("*/trainer_state.json")), *sorted(folder.glob("*/seed-*/trainer_state.json"))]
    logs = {str(path.parent.relative_to(folder)): read_log(path.parent) for path in paths}
    if logs:
        sections += [tau_curves(logs), weights(logs)]
    return [*sections, provenance(benchmark, results.target, folder)]


def benchmark_of(results: Results) -> BenchResults | None:
    """Take what decoding gave; None for servers, and where nothing was decoded."""
    decoded = results.decode if isinstance(results, CompareResults) else results
    return decoded if isinstance(decoded, BenchResults) and decoded.rows else None


def _benchmark(results: BenchResults) -> list[Section]:
    sections = [headline(results), speeds(results)]
    if results.heldout:
        sections.append(heldout(results))
    if results.comparisons:
        sections.append(paired(results))
    sections += [slots(results), lengths(results), widths(results)]
    if len({prediction.concurrency for prediction in results.predictions}) > 1:
        sections.append(concurrency(results))
    return [*sections, scatter(results), *examples(results)]


def to_markdown(sections: Sequence[Section]) -> str:
    """Write headings, texts and tables; figures are only in the page."""
    lines = []
    for section in sections:
        lines += [f"## {as_markdown(section.title)}", "", as_markdown(section.text), ""]
        if section.rows:
            head, *body = [[as_markdown(cell) for cell in row] for row in section.rows]
            lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
        for set_name, example in section.examples:
            text = "".join(f"[{piece}]" if is_draft else piece for piece, is_draft in example.pieces)
            about = f"{set_name}, {example.what}: {example.id}"
            lines += [f"{as_markdown(about)}, tau {example.tau:.2f}", ""]
            lines += ["    " + printable(line) for line in text.splitlines()] + [""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Keep an interval together where the browser breaks lines."""
    return re.sub(r" %|(?<=,) (?=[^\[]*\])", lambda found: found[0].replace(" ", "\u00a0"), text)


def _finalize(value: object) -> object:
    """Show control characters; the SVG, which is marked as safe, has none."""
    return printable(value) if type(value) is str else value


def _template():
    import jinja2

    source = (files("dpace") / "report" / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize)
    environment.filters["cell"] = _cell
    return environment.from_string(source)
