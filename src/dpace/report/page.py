"""Write results and training logs as one HTML page, which needs no network and has no script.

In come folders with the results of other verbs. Each result becomes sections: the tables that the terminal shows, and
drawings.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from dpace.measure.results import (
    CompareResults,
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
from dpace.respond.responses import iterate_responses
from dpace.system.ledger import JsonObject, lock_folder, refuse_foreign_files, register_files, write_text
from dpace.system.progress import printable, shorten
from dpace.system.validation import to_json

NUM_SHOWN = 2
"""Conversations that are shown, from the beginning of the answers."""
SHOWN_CHARACTERS = 240
"""Characters of a message that are shown."""


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
    chapters = []
    targets = {}
    for folder in map(Path, folders):
        for results in find_results(folder):
            chapters.append((str(folder), sections_of(results, folder)))
            targets[Path(results.target).name] = None  # a set that keeps its order
    template = jinja2.Template(
        (Path(__file__).parent / "report.html.jinja").read_text(), autoescape=True, finalize=_without_control
    )
    page = template.render(
        title=f"Drafters for {', '.join(targets)}",
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command("report", *folders, output=path),
        results=chapters,
    )
    with lock_folder(path.parent):
        register_files(path.parent, path.name)
        write_text(path, page)


def _without_control(value: object) -> object:
    """Show control characters of a text; a drawing is a subclass of str that is marked as safe, and stays."""
    return printable(value) if type(value) is str else value


def sections_of(results: Results, folder: Path) -> Iterator[Section]:
    """Yield all that results, and the training logs in their folder, have to show."""
    yield from tables_of(results)
    if isinstance(results, ServerResults):
        return
    paths = [*sorted(folder.glob("*/trainer_state.json")), *sorted(folder.glob("*/seed-*/trainer_state.json"))]
    logs: dict[str, list[list[JsonObject]]] = {}
    for path in paths:
        objective = path.relative_to(folder).parts[0]
        logs.setdefault(objective, []).append(read_log(path.parent))
    if logs:
        for title, text, draw in DRAWINGS:
            yield Section(title, text, drawing=draw(logs))
    measured = results
    if isinstance(results, CompareResults):
        measured = results.decode
    if measured:
        rows = []
        for field in fields(Provenance):
            value = to_json(getattr(measured, field.name))
            if value is not None:
                rows.append({"fact": field.name, "value": json.dumps(value)})
        yield Section("Provenance", "", rows, num_texts=2)
    answers = folder / "responses.jsonl"
    if answers.exists():
        yield scored_text(answers)


def scored_text(answers: Path) -> Section:
    """Show the beginnings of what is said in some conversations, and which answers a drafter's training scores."""
    rows = []
    for response in islice(iterate_responses(answers), NUM_SHOWN):
        roles = [message.get("role") for message in response.messages]
        replies = [place for place, role in enumerate(roles) if role == "assistant"]
        # The last replies have the spans: those before may be the prompt's, or a template has rewritten them.
        scored = replies[len(replies) - len(response.response_spans) :]
        for place, message in enumerate(response.messages):
            cells = {
                "conversation": response.id,
                "role": str(roles[place]),
                "scored": "yes" if place in scored else "",
                "text": shorten(message.get("content") or message.get("tool_calls"), SHOWN_CHARACTERS),
            }
            rows.append(cells)
    return Section("What is scored, in some conversations", "", rows, num_texts=4)
