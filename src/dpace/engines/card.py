"""Write a drafter's model card: what it is, its results, how it was trained and how to serve it.

What comes in is what was written, the drafter as it was measured, and the results beside its folder; what goes out is
`README.md`, by the template `card.md.jinja`. Each engine has its own part (`Engine.section`).
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jinja2
import yaml

from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec
from dpace.engines import EngineName, all_engines, engine_of
from dpace.engines.engine import Request
from dpace.measure.results import BenchResults, read_results
from dpace.recipes.recipe_file import read_recipe
from dpace.recipes.validation import to_json
from dpace.report.sections import speeds
from dpace.report.tables import as_code, as_markdown, to_markdown
from dpace.system.ledger import write_text
from dpace.system.progress import printable
from dpace.system.provenance import fingerprint

Found = TypeVar("Found")
TAGS = ["dflash", "speculative-decoding", "block-diffusion", "draft-model", "efficiency"]
PLACES = ("server", "init", "feature_files", "feature_servers")
"""Options that name files and servers."""


def engine_sections(layout: str, spec: DrafterSpec, drafter: str, target: str) -> dict[EngineName, str]:
    """Write the parts of a model card that say how to serve a drafter, by the engine's name.

    Args:
        layout: of the files, see `Engine.layout`.
        spec: of the drafter.
        drafter: what engines are given for it: a name, or a GGUF file.
        target: name of the target.
    """
    parts: dict[EngineName, str] = {}
    for engine in all_engines():
        if part := engine.section(layout, spec, drafter, target):
            parts[engine.name] = part
    return parts


def write_card(
    path: Path, drafter: Drafter, request: Request, *, folder: Path, source: Drafter, merging: str = ""
) -> None:
    """Write `README.md` beside what was exported.

    Args:
        path: the folder, or the file in it.
        drafter: as it was written.
        request: names, license and precision. A target that is a folder of this machine is no `base_model`.
        folder: that the drafter was read from. The card has its `recipe.yaml`, and those rows of the `results.json`
            beside the folder that were measured with these weights.
        source: the drafter that was read.
        merging: lines that merge the target, where engines cannot serve it as it is.
    """
    spec = drafter.spec
    engine = engine_of(request.to)
    served = path.name if path.is_file() else request.name
    sections = engine_sections(engine.layout, spec, served, request.target_name)
    recipe = _read_beside(folder / "recipe.yaml", read_recipe)
    results = None if request.is_plain else _measured(folder, source)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"code": as_code, "markdown": as_markdown}
    text = environment.get_template("card.md.jinja").render(
        request=request,
        engine=engine,
        spec=spec,
        name=Path(request.name).name,
        target=request.target_name,
        is_local=Path(request.target_name).is_dir(),
        merging=merging,
        tags=TAGS + [name for name in sections if engine_of(name).layout == engine.layout],
        results=results,
        table=results and to_markdown(speeds(results)._replace(title="Results", text="", note="")),
        sections=sections.values(),
        recipe=recipe,
        options=recipe and _repeat(recipe),
    )
    write_text((path.parent if path.is_file() else path) / "README.md", text)


def _read_beside(path: Path, read: Callable[[Path], Found]) -> Found | None:
    """Read a file that may lie beside a drafter; None, with a line that says why, where it cannot be read."""
    try:
        return read(path) if path.exists() else None
    except (ValueError, OSError) as error:  # another program's file, or another version's
        print(f"the model card has nothing of {path.name}: {printable(str(error))}", file=sys.stderr)


def _measured(folder: Path, drafter: Drafter) -> BenchResults | None:
    """Read the rows of `dpace bench` that were measured with these weights; None where there are none."""
    results = _read_beside(folder.resolve().parent / "results.json", read_results)
    if not isinstance(results, BenchResults):
        return None
    weights = fingerprint(drafter, dtype=results.dtype)  # they may have been loaded in another one here
    rows = [row for row in results.rows if results.drafters.get(row.drafter) == weights]
    return replace(results, rows=rows) if rows else None


def _repeat(recipe: Recipe) -> str:
    """Write the recipe of `dpace train` again, without the places of files and servers."""
    groups = {name: to_json(getattr(recipe, name)) for name in ("respond", "drafter", "loss", "train")}
    kept = {name: {key: value for key, value in group.items() if key not in PLACES} for name, group in groups.items()}
    return yaml.safe_dump(kept, sort_keys=False).replace("```", "~~~")
