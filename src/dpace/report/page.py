"""Write results and training logs as one HTML page, which needs no network and has no script.

In come the folders of `dpace demo`, `bench` and `compare`. Each result becomes sections: the tables that the terminal
shows, and drawings.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpace.measure.results import ExplainResults, Results, ServerResults, benchmark_of, find_results, read_log
from dpace.recipes.flags import command
from dpace.report.plots import acceptance_by_slot, slot_weights, training_curves
from dpace.report.sections import tables_of, whole_blocks
from dpace.report.tables import Section
from dpace.system.ledger import lock_folder, refuse_foreign_files, register_files, write_text
from dpace.system.progress import printable


def write_report(folders: Sequence[str | Path], path: str | Path) -> None:
    """Write the page.

    Args:
        folders: of `dpace demo`, `bench` or `compare`; each has a results.json or servers.json, and may have drafters
            with their training logs.
        path: of the HTML file.

    Raises:
        ValueError: a folder without results, or with a file that is not what this version writes; a page there that
            dpace did not write; or another process is writing to that folder.
        OSError: a file that cannot be read or written.
    """
    import jinja2

    path = Path(path)
    if path.is_dir() or path.suffix != ".html":
        raise ValueError(f"the output {path} is no HTML file; name one with --output, such as report.html")
    refuse_foreign_files(path.parent, path.name)  # before anything is read
    measured = [(results, Path(folder)) for folder in folders for results in find_results(Path(folder))]
    targets = dict.fromkeys(Path(results.target).name for results, _ in measured)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not the SVG, marked as safe
    )
    page = environment.get_template("report.html.jinja").render(
        title=f"Drafters for {', '.join(targets)}",
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command("report", *folders, output=path),
        results=[(heading(results, folder), sections_of(results, folder)) for results, folder in measured],
    )
    with lock_folder(path.parent):
        register_files(path.parent, path.name)
        write_text(path, page)


def heading(results: Results, folder: Path) -> str:
    """Name a folder, and say where answers were measured with thinking."""
    measured = results if isinstance(results, ServerResults | ExplainResults) else benchmark_of(results)
    return f"{folder}, with thinking" if measured and measured.thinking else str(folder)


def sections_of(results: Results, folder: Path) -> Iterator[Section]:
    """Yield all that results, and the training logs beside them, have to show."""
    yield from tables_of(results)
    if isinstance(results, ServerResults | ExplainResults):
        return
    if whole := whole_blocks(results):
        text = "The share of verifications that accepted slots 1 to k of a whole draft; shades are 95 % intervals."
        yield Section("Acceptance by slot", text, drawing=acceptance_by_slot(whole))
    logs: dict[str, list[list[dict[str, Any]]]] = {}  # by the drafter's name, one for each seed
    for path in [*sorted(folder.glob("*/trainer_state.json")), *sorted(folder.glob("*/seed-*/trainer_state.json"))]:
        logs.setdefault(path.relative_to(folder).parts[0], []).append(read_log(path.parent))
    if logs:
        text = (
            "Losses of different objectives have different scales; tau can be compared. It is measured on the "
            "validation share of the training prompts, and chooses the checkpoint."
        )
        yield Section("Training", text, drawing=training_curves(logs))
        text = (
            "Each slot's share of a block's weight, at up to five steps. D-PACE moves weight to later slots as the "
            "drafter gets better at the first ones; fixed schedules do not."
        )
        yield Section("Weights over training", text, drawing=slot_weights(logs))
    if measured := benchmark_of(results):
        facts = {name: str(getattr(measured, name)) for name in ("target", "engine", "dtype", "seed", "max_new_tokens")}
        if measured.thinking is not None:
            facts["thinking"] = "on" if measured.thinking else "off"
        for name in ("hardware", "versions"):
            facts[name] = ", ".join(f"{key} {value}" for key, value in vars(getattr(measured, name)).items())
        hashes = {"the target's weights": measured.target_weights_sha256, **measured.drafters}
        facts |= {f"sha256 of {name}": digest[:16] for name, digest in hashes.items() if digest}
        yield Section("Provenance", "", [{"fact": name, "value": fact} for name, fact in facts.items()], num_texts=2)
