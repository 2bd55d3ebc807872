"""Write results and training logs as one HTML page that needs no network, and as Markdown.

In come the folders of `dpace demo`, `bench` and `compare`. Each result becomes sections, made from its rows: a heading,
what to read from it, and a table or plots. The page and the Markdown write the same sections, the Markdown without
plots.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

from dpace.measure.results import (
    RESULT_FILES,
    BenchResults,
    CompareResults,
    Results,
    ServerResults,
    benchmark_of,
    find_results,
    read_log,
)
from dpace.recipes.flags import command
from dpace.report.cells import (
    PAIR_COLUMNS,
    SERVER_COLUMNS,
    SPEEDUP,
    Column,
    Section,
    advice,
    as_code,
    as_markdown,
    compared_columns,
    compiled_note,
    copied_note,
    result_columns,
    texts_note,
    verdict,
    with_interval,
)
from dpace.report.plots import acceptance_by_slot, slot_weights, tau_curves
from dpace.system.ledger import lock_folder, refuse_foreign_files, register_files, write_text
from dpace.system.progress import printable


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
    if path.is_dir() or path.suffix != ".html":
        raise ValueError(f"the output {path} is no HTML file; name one with --output, such as report.html")
    markdown = path.with_suffix(".md")
    refuse_foreign_files(path.parent, path.name, markdown.name)  # before anything is read
    measured = [(results, Path(folder)) for folder in folders for results in find_results(Path(folder))]
    sections = [section for results, folder in measured for section in sections_of(results, folder)]
    targets = dict.fromkeys(Path(results.target).name for results, _ in measured)
    title = f"Drafters for {', '.join(targets)}"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    called = command("report", *folders, output=path)
    page = _template().render(sections=sections, title=title, date=date, command=called)
    about = f"Written on {date} by `{as_code(called)}`."
    with lock_folder(path.parent):
        register_files(path.parent, path.name, markdown.name)
        write_text(path, page)
        write_text(markdown, "\n".join([f"# {as_markdown(title)}", "", about, "", to_markdown(sections)]))
    return [path, markdown]


def sections_of(results: Results, folder: Path) -> Iterator[Section]:
    """Yield all that results, and the training logs beside them, have to show."""
    if isinstance(results, ServerResults):
        yield from tables_of(results)
        return
    if isinstance(results, CompareResults):
        yield comparison(results)
    benchmark = benchmark_of(results)
    if benchmark:
        yield headline(benchmark)
        yield from tables_of(benchmark)
        if benchmark.whole_blocks:
            yield acceptance_by_slot(benchmark.whole_blocks)
    groups: dict[str, list[list[dict]]] = {}  # by the drafter's name, a log for each seed
    for path in [*sorted(folder.glob("*/trainer_state.json")), *sorted(folder.glob("*/seed-*/trainer_state.json"))]:
        groups.setdefault(path.relative_to(folder).parts[0], []).append(read_log(path.parent))
    if groups:
        yield tau_curves(groups)
        yield slot_weights(groups)
    yield provenance(benchmark, results.target, folder)


def tables_of(results: BenchResults | ServerResults) -> Iterator[Section]:
    """Yield the tables of a benchmark, which the terminal shows too."""
    if isinstance(results, ServerResults):
        yield servers(results)
    else:
        yield speeds(results)
        if results.comparisons:
            title = f"Compared with {results.comparisons[0].baseline}"
            text = "Differences on the same prompts, with 95 % intervals of the paired difference."
            yield Section(title, text, PAIR_COLUMNS, results.comparisons)


def headline(results: BenchResults) -> Section:
    """Tell in one sentence a set what a user gets."""
    lines = []
    for name in dict.fromkeys(row.set for row in results.rows):
        greedy = [row for row in results.rows if row.set == name and row.temperature == 0]
        if not greedy:
            continue
        as_used = [row for row in greedy if row.width == "auto"] or greedy  # not the best of all that was tried
        best = max(as_used, key=lambda row: row.decode_speedup or 0)
        copied = f"; {best.share_copied:.0%} of the tokens were copied from the text" if best.share_copied else ""
        lines.append(
            f"{name}: {verdict(best.decode_speedup_interval)}, decode_speedup {SPEEDUP.write(best)} with "
            f"{best.drafter}, width {best.width}, at temperature 0{copied}"
        )
    lines.append(f"Altogether: {advice(results)}")
    if results.num_responses:
        lines.append(f"{results.num_same_text} of {results.num_responses} responses are exactly the target's own text")
    return Section(f"Decoding {Path(results.target).name}", ". ".join(lines) + ".")


def speeds(results: BenchResults) -> Section:
    """Make the table by set and temperature."""
    text = (
        "tau is the mean acceptance length: the tokens that one pass of the target emits, averaged over verifications. "
        "With width auto, passes without a draft count too. decode_speedup divides the tokens a second with the "
        "drafter by those of plain decoding; reading the prompt is not counted. Brackets hold 95 % intervals, by "
        "bootstrap over prompts. The starred columns follow published tables: the mean over responses of their means, "
        "and the ratio of mean seconds a token."
    )
    title = f"Speed: {Path(results.target).name}, {results.dtype}, {results.hardware.device}"
    note = "; ".join(filter(None, [copied_note(results.rows), compiled_note(results.rows)]))
    return Section(title, text, result_columns(results.rows), results.rows, note)


def servers(results: ServerResults) -> Section:
    """Make the table of a benchmark of running servers."""
    names = ", ".join(f"{side} {server.engine} at {server.url}" for side, server in results.servers.items())
    text = (
        "tau is the mean acceptance length that the server reports; beside it is that of whole drafts in this process, "
        "on the same prompts. tok/s counts the tokens of a request after its first one, one request at a time. Same "
        "text and control count the texts that are those of the plain server's first pass: with the drafter, and in "
        "its second pass."
    )
    trained = f"tau in training, on validation responses: {with_interval(results.tau_in_training)}"
    note = "; ".join(filter(None, [trained, texts_note(results.rows)]))
    return Section(f"{Path(results.target).name}: {names}", text, SERVER_COLUMNS, results.rows, note)


def comparison(results: CompareResults) -> Section:
    """Make the table of `dpace compare`."""
    seeds = ", ".join(map(str, results.seeds))
    text = (
        "Mean acceptance length (tau) on held-out prompts at temperature 0. Intervals are 95 %, paired: by bootstrap "
        "over prompts, and by Student's t over seeds."
    )
    columns = compared_columns(results.baseline, results.decode.rows if results.decode else ())
    title = f"Objectives, {Path(results.target).name}, reduction {results.reduction}, seeds {seeds}"
    return Section(title, text, columns, results.rows)


def provenance(results: BenchResults | None, target: str, folder: Path) -> Section:
    """List what made the numbers."""
    written = max((folder / name).stat().st_mtime for name in RESULT_FILES if (folder / name).exists())
    date = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d")
    facts = {"folder": str(folder), "results written": date, "target": target}
    if results:
        facts |= {
            "dtype": results.dtype,
            "engine": results.engine,
            "seed": "; ".join(filter(None, (str(results.seed), results.prompt_seeds))),
            "max_new_tokens": str(results.max_new_tokens),
        }
        for name in ("hardware", "versions"):
            facts[name] = ", ".join(f"{key} {value}" for key, value in vars(getattr(results, name)).items())
        hashes = {"the target's weights": results.target_weights_sha256, **results.drafters}
        facts |= {f"sha256 of {name}": digest[:16] for name, digest in hashes.items() if digest}
    return Section("Provenance", "", [Column("", itemgetter(number)) for number in (0, 1)], list(facts.items()))


def to_markdown(sections: Sequence[Section]) -> str:
    """Write headings, texts and tables; figures are only in the page."""
    lines = []
    for section in sections:
        lines += [f"## {as_markdown(section.title)}", "", as_markdown(section.text), ""]
        if section.rows:
            head, *body = ["| " + " | ".join(map(as_markdown, row)) + " |" for row in section.rows]
            lines += [head, "|" + "---|" * len(section.rows[0]), *body, ""]
        if section.note:
            lines += [as_markdown(section.note), ""]
    return "\n".join(lines)


def _template():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not the SVG, marked as safe
    )
    environment.filters["cell"] = _keep_interval
    return environment.get_template("report.html.jinja")


def _keep_interval(text: str) -> str:
    """Keep an interval together where the browser breaks lines."""
    return re.sub(r" %|(?<=,) (?=[^\[]*\])", lambda match: match[0].replace(" ", "\u00a0"), text)
