"""Write results and training logs as one HTML page, which needs no network and has no script.

In come folders with the results of other verbs. Each result becomes sections: the tables that the terminal shows, and
drawings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from dpace.measure.records import group_by
from dpace.measure.results import (
    CompareResults,
    ExplainResults,
    Provenance,
    Results,
    ServerResults,
    find_results,
    read_log,
)
from dpace.recipes.flags import command
from dpace.report.plots import DRAWINGS
from dpace.report.sections import tables_of
from dpace.report.tables import Section
from dpace.system.ledger import lock_folder, refuse_foreign_files, register_files, write_text
from dpace.system.progress import printable
from dpace.system.validation import to_json


def write_report(folders: Sequence[str | Path], path: str | Path) -> None:
    """Write the page.

    Args:
        folders: that other verbs wrote; each has results, see `find_results`, and may have drafters with their training
            logs.
        path: of the HTML file.

    Raises:
        ValueError: a folder without results, or with a file that is not what this version writes; a page there that
            dpace did not write; or another process is writing to that folder.
        OSError: a file that cannot be read or written.
    """
    import jinja2

    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"the output {path} is no HTML file; name one with --output, such as report.html")
    refuse_foreign_files(path.parent, path.name)  # before anything is read
    measured = [(results, Path(folder)) for folder in folders for results in find_results(Path(folder))]
    targets = dict.fromkeys(Path(found.target).name for found, _ in measured)
    template = jinja2.Template(
        (Path(__file__).parent / "report.html.jinja").read_text(),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not the SVG, marked as safe
    )
    page = template.render(
        title=f"Drafters for {', '.join(targets)}",
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command("report", *folders, output=path),
        results=[(str(folder), sections_of(results, folder)) for results, folder in measured],
    )
    with lock_folder(path.parent):
        register_files(path.parent, path.name)
        write_text(path, page)


def sections_of(results: Results, folder: Path) -> Iterator[Section]:
    """Yield all that results, and the training logs beside them, have to show."""
    yield from tables_of(results)
    if isinstance(results, ServerResults | ExplainResults):
        return
    paths = [*sorted(folder.glob("*/trainer_state.json")), *sorted(folder.glob("*/seed-*/trainer_state.json"))]
    by_name = group_by(paths, lambda path: path.relative_to(folder).parts[0])
    logs = {name: [read_log(path.parent) for path in of_name] for name, of_name in by_name.items()}
    for title, text, draw in DRAWINGS if logs else ():
        yield Section(title, text, drawing=draw(logs))
    measured = results.decode if isinstance(results, CompareResults) else results
    if measured:
        facts = {field.name: to_json(getattr(measured, field.name)) for field in fields(Provenance)}
        rows = [{"fact": name, "value": _fact(value)} for name, value in facts.items() if value is not None]
        yield Section("Provenance", "", rows, num_texts=2)


def _fact(value: object) -> str:
    """Write a value, or the entries of a list or an object."""
    entries = [f"{name} {entry}" for name, entry in value.items()] if isinstance(value, dict) else value
    return ", ".join(map(str, entries)) if isinstance(entries, list) else str(value)
