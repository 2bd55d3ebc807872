"""Write a drafter's model card: what it is, its results, how it was trained and how to serve it.

What comes in is what was written, the drafter as it was measured, and the results beside its folder; what goes out is
`README.md`, by the template `card.md.jinja`. Each engine has its own part (`Engine.card`).
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jinja2
import yaml

from dpace.config import EngineName, ExportConfig, Recipe
from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec
from dpace.engines import all_engines, engine_of
from dpace.measure.results import (
    BenchResults,
    Row,
    ServerAddress,
    ServerResults,
    read_results,
    split_depth,
    write_profile,
)
from dpace.recipes.recipe_file import read_recipe
from dpace.report.sections import best_depths, depths_note, speeds, verdict
from dpace.report.tables import as_code, as_markdown, to_markdown
from dpace.system.ledger import write_text
from dpace.system.progress import printable
from dpace.system.provenance import fingerprint, hash_file
from dpace.system.validation import to_json
from dpace.target import Target

TAGS = ["dflash", "speculative-decoding", "block-diffusion", "draft-model", "efficiency"]
Read = TypeVar("Read")
PLACES = ("server", "init", "feature_files", "feature_servers")
"""Options that name files and servers."""
LEAST_SHARE = 0.1
"""Share of the verifications in which a draft token has to be accepted to pay, where no speed was measured: a guess,
since the time of one more token in a pass, over that of a plain one, differs by engine and machine."""


def engine_sections(
    layout: str, spec: DrafterSpec, drafter: str, target: str, served: ServerResults | None = None
) -> dict[EngineName, str]:
    """Write the parts of a model card that say how to serve a drafter, by the engine's name.

    Args:
        layout: of the files, see `Engine.layout`.
        spec: of the drafter.
        drafter: what engines are given for it: a name, or a GGUF file.
        target: name of the target.
        served: what depths gave with servers of one engine, whose part then says so. Its command has the smallest one
            that is the best of a set.
    """
    sections: dict[EngineName, str] = {}
    for engine in all_engines():
        if not engine.card or engine.layout != layout or engine.fault(spec):
            continue
        num_drafts = spec.num_draft_tokens
        p_min = ngrams = ""
        note = ""
        if served and _server_of(served).engine in (engine.name, engine.title):
            note = f"\n\n{_depth_note(served)}"
            depths = [split_depth(row.depth) for row in best_depths(served.rows).values() if row and row.depth]
            num_drafts, p_min, ngrams = min(depths, default=(num_drafts, p_min, ngrams))
        command = engine.command(_with_drafts(spec, num_drafts), drafter, target)
        if p_min:
            command += f" --spec-draft-p-min {p_min}"
        if ngrams:
            command = command.replace(" --spec-draft-n-max", f",{ngrams} --spec-draft-n-max")
        sections[engine.name] = engine.card.format(drafter=drafter, target=target, command=command).rstrip() + note
    return sections


def _server_of(served: ServerResults) -> ServerAddress:
    """Return the first server with a drafter, whose engine and version are those of all."""
    return served.servers[f"{served.rows[0].depth}"]


def _depth_note(served: ServerResults) -> str:
    """Say which depth is best, and where that was measured."""
    server = _server_of(served)
    machine = "another machine than dpace"
    if served.hardware:
        machine = f"{served.hardware.device} ({served.hardware.cores} cores)"
    measured = f"{server.engine} {server.version or ''} on {machine}, best number of draft tokens by kind of text"
    return as_markdown(f"Measured with {measured}, against no drafter: {depths_note(served.rows)}.")


def _with_drafts(spec: DrafterSpec, num_drafts: int) -> DrafterSpec:
    """Return what a drafter is with other drafts."""
    return replace(spec, block_size=spec.block_size - spec.num_draft_tokens + num_drafts)


def write_card(
    path: Path, drafter: Drafter, config: ExportConfig, *, folder: Path, source: Drafter, target: Target
) -> None:
    """Write `README.md` and `speculation_profile.json` beside what was exported.

    Args:
        path: the folder, or the file in it.
        drafter: as it was written.
        config: names, license and precision. A target that is a folder of this machine is no `base_model`.
        folder: that the drafter was read from. The card has its `recipe.yaml`, and those rows of the `results.json`
            beside the folder that were measured with these weights.
        source: the drafter that was read.
        target: its target.
    """
    spec = drafter.spec
    engine = engine_of(config.to)
    gguf = engine_of("gguf")
    served = path.name if path.is_file() else config.served_name
    served_target = config.served_target
    if config.served_gguf:
        served_target = Path(config.served_gguf).name
    recipe = _read_beside(folder / "recipe.yaml", read_recipe)
    results = None
    served_depths = None
    if not config.plain:  # without its selector the drafter was not measured
        results = _measured(folder, source)
        served_depths = _served(folder)
    whole_drafts = []
    if results:
        whole_drafts = [row for row in results.rows if row.width == "full" and row.tokens_per_second]
    # Of whole drafts in training; drafters of others say nothing.
    reach_rates = spec.record.get("reach_rate", [1] * spec.num_draft_tokens)
    likely_drafts = sum(rate >= LEAST_SHARE for rate in reach_rates)
    # One number for all sets: what pays on each of them.
    num_drafts = max(1, min(map(paying_drafts, whole_drafts), default=likely_drafts))
    sections = engine_sections(
        engine.layout, _with_drafts(spec, num_drafts), served, served_target, served=served_depths
    )
    template = jinja2.Template(
        Path(__file__).with_name("card.md.jinja").read_text(), trim_blocks=True, keep_trailing_newline=True
    )
    text = template.render(
        code=as_code,
        markdown=as_markdown,
        config=config,
        engine=engine,
        spec=spec,
        is_local=Path(config.served_target).exists(),
        tags=[*TAGS, *sections],
        results=results,
        table=results and to_markdown(speeds(results)._replace(title="Results", text="", note="")),
        sections=sections,
        fits_gguf=not (gguf.fault(replace(spec, selector=None)) or gguf.target_fault(target.model.config.model_type)),
        needs_plain=gguf.fault(spec),
        verdicts=[verdict(row.decode_speedup) for row in whole_drafts],
        num_drafts=num_drafts,
        measured_engine=served_depths and _server_of(served_depths).engine,
        recipe=recipe,
        options=recipe and _repeat(recipe),
    )
    aside = path.parent if path.is_file() else path
    write_text(aside / "README.md", text)
    write_profile(aside, spec, results.rows if results else [], served_target)


def paying_drafts(row: Row) -> int:
    """Estimate how many tokens of a draft pay, from a row of whole drafts.

    A draft and its verification take as long as some number of plain tokens. What this number is above 1, in equal
    shares, is what a draft token costs: it pays where it is accepted in a larger share of the verifications.
    """
    rates = row.reach_rate
    # What a draft emits on average, times the plain seconds of a token over its own seconds of one.
    plain_tokens = (1 + sum(rates)) * row.plain_tokens_per_second / row.tokens_per_second
    cost = (plain_tokens - 1) / len(rates)
    return sum(rate > cost for rate in rates)


def _read_beside(path: Path, read: Callable[[Path], Read]) -> Read | None:
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
    # They may have been loaded in another one here; with a target in 8 bits they are in fp32.
    weights = fingerprint(drafter, dtype=results.dtype.replace("int8", "float32"))
    rows_of_drafter = [row for row in results.rows if results.drafters.get(row.drafter) == weights]
    if not rows_of_drafter:
        return None
    return replace(results, rows=rows_of_drafter)


def _served(folder: Path) -> ServerResults | None:
    """Read the depths that `dpace bench --server` compared with these weights; None where there are none."""
    results = _read_beside(folder.resolve().parent / "servers.json", read_results)
    if not isinstance(results, ServerResults) or not results.rows[0].depth:
        return None
    weights = folder / "model.safetensors"
    if not weights.exists() or results.drafter_sha256 != hash_file(weights):
        return None
    return results


def _repeat(recipe: Recipe) -> str:
    """Write the recipe of `dpace train` again, without the places of files and servers."""
    groups = {}
    for group in ("respond", "drafter", "loss", "train"):
        settings = to_json(getattr(recipe, group))
        groups[group] = {key: value for key, value in settings.items() if key not in PLACES}
    # Backticks would end the block of code in which the card has it.
    return yaml.safe_dump(groups, sort_keys=False).replace("```", "~~~")
