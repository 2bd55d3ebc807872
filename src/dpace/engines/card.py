"""Write a drafter's model card: what it is, its results, how it was trained and how to serve it.

What comes in is what was written, the drafter as it was measured, and the results beside its folder; what goes out is
`README.md`, by the template `card.md.jinja`. Each engine has its own part (`Engine.section`).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec
from dpace.engines import EngineName, all_engines, engine_of
from dpace.engines.engine import Contents, Request
from dpace.engines.folder import mapping, read_recipe_values
from dpace.measure.results import BenchResults, read_results
from dpace.report.sections import speeds
from dpace.report.tables import as_code, as_markdown, to_markdown
from dpace.system.ledger import write_text
from dpace.system.provenance import fingerprint

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
    path: Path, contents: Contents, request: Request, *, source: Path, drafter: Drafter, merging: str = ""
) -> None:
    """Write `README.md` beside what was exported.

    Args:
        path: the folder, or the file in it.
        contents: what was written.
        request: names and license. A target that is a folder of this machine is no `base_model`.
        source: the drafter's own folder. The card has its `recipe.yaml`, and those rows of the `results.json` beside
            the folder that were measured with these weights.
        drafter: as it was measured, in the target's dtype.
        merging: lines that merge the target, where engines cannot serve it as it is.
    """
    engine = engine_of(request.to)
    target = request.target_name
    is_local = Path(target).is_dir()
    served = path.name if path.is_file() else request.name
    sections = engine_sections(engine.layout, contents.spec, served, target)
    readers = [engine_of(name) for name in sections]
    front = {  # which the Hub reads
        "library_name": engine.library,
        "pipeline_tag": "text-generation",
        "license": request.license,
        **({} if is_local else {"base_model": target}),
        "tags": [*TAGS, *(tag for reader in readers if reader.layout == engine.layout for tag in reader.tags)],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": as_code, "markdown": as_markdown}
    text = environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(front, sort_keys=False),
        name=Path(request.name).name,
        target=target,
        is_local=is_local,
        merging=merging,
        spec=contents.spec,
        dtype=contents.dtype,
        results=_results_section(source, drafter, contents.dtype if contents.rounding else None),
        sections=sections.values(),
        objective_sha256=mapping(getattr(drafter.config, "dpace", None)).get("objective_sha256"),
        **_recipe(source),
    )
    write_text((path.parent if path.is_file() else path) / "README.md", text)


def _results_section(source: Path, drafter: Drafter, rounded_to: str | None) -> str:
    """Write what `dpace bench` measured with these weights; empty where there is nothing."""
    path = source.resolve().parent / "results.json"
    try:
        results = read_results(path) if path.exists() else None
    except (ValueError, OSError) as error:  # another program's file, or another version's
        print(f"the model card has no measured numbers of {path.name}: {error}", file=sys.stderr)
        return ""
    if not isinstance(results, BenchResults):
        return ""
    weights = fingerprint(drafter, dtype=results.dtype)  # they may have been loaded in another one here
    rows = [row for row in results.rows if results.drafters.get(row.drafter) == weights]
    measured = (
        f"Measured for {Path(results.target).name} with {results.engine} in {results.dtype} on "
        f"{results.hardware.device} ({results.hardware.cores} cores), at most {results.max_new_tokens} tokens a "
        "response. tau: tokens emitted per verification. decode_speedup: tokens a second over plain decoding (the "
        "baseline, in brackets) of the same prompts. With intervals of 95 % over prompts."
    )
    if rounded_to:
        measured += f" The weights here are {rounded_to}, rounded from those that were measured."
    table = speeds(replace(results, rows=rows))._replace(title="Results", text=measured, note="")
    return to_markdown(table) if rows else ""


def _recipe(source: Path) -> dict[str, Any]:
    """Repeat the recipe of `dpace train`, without the places of files and servers, and name the objective."""
    problems: dict[str, str] = {}
    recipe = read_recipe_values(source, problems)
    for problem in problems.values():
        print(f"the model card has no recipe: {source / 'recipe.yaml'}: {problem}", file=sys.stderr)
    kept = {
        name: {key: value for key, value in mapping(recipe[name]).items() if key not in PLACES}
        for name in ("respond", "drafter", "loss", "train")
        if name in recipe
    }
    text = yaml.safe_dump(kept, sort_keys=False).replace("```", "~~~") if kept else ""
    return {"recipe": text, "objective": str(mapping(recipe.get("loss")).get("objective"))}
