"""Write a drafter's model card: what it is, its results, how it was trained and how to serve it."""

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from dpace.config import Format
from dpace.drafter import Drafter
from dpace.engines.best_lengths import Advice, best_lengths, served_lengths
from dpace.engines.folder import mapping, read_recipe
from dpace.engines.serving import card_sections
from dpace.ledger import write_text
from dpace.loading import fingerprint
from dpace.measure.results import RESULT_FILES, BenchResults, Results, ServerResults, read_results
from dpace.measure.rows import Row
from dpace.report.cells import copied_note, with_interval
from dpace.report.markdown import as_code, as_markdown
from dpace.spec import DrafterSpec

TAGS = ["dflash", "speculative-decoding", "block-diffusion", "draft-model", "efficiency"]
_LIBRARIES = {"speculators": "speculators", "gguf": "gguf"}


def write_card(
    path: Path,
    spec: DrafterSpec,
    *,
    to: Format,
    name: str,
    target_name: str,
    license: str,
    dtype: torch.dtype,
    is_rounded: bool,
    source: Path,
    drafter: Drafter,
) -> None:
    """Write `README.md` beside what was exported.

    Args:
        path: the folder, or the GGUF file in it.
        spec: of the drafter.
        to: what was written.
        name: what the drafter is called: a Hub id or a folder's name.
        target_name: what the target is called; left out of `base_model` where it is a folder of this machine.
        license: of the weights.
        dtype: of the matrices.
        is_rounded: whether the export changed their values.
        source: the drafter's own folder. The card has its `recipe.yaml`, and those rows of the `results.json` beside
            the folder that were measured with these weights.
        drafter: as it was measured, in the target's dtype.
    """
    is_local = Path(target_name).is_dir()
    target = Path(target_name).name if is_local else target_name
    front = _front_matter(to, license, None if is_local else target_name)
    weights = str(dtype).removeprefix("torch.")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {as_markdown(Path(name).name)}",
        f"A DFlash drafter for `{as_code(target)}`. It is not a model to use alone: it proposes tokens, and the target "
        "keeps those that it would have written itself.",
        _facts(spec, target, weights),
        *_results(source, drafter, weights if is_rounded else None),
        "## How to serve it",
        *card_sections(to, drafter=name, gguf=path.name, target=target, block_size=spec.block_size),
        *_recipe(source, mapping(getattr(drafter.config, "dpace", None)).get("objective_sha256")),
    ]
    folder = path.parent if to == "gguf" else path
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _front_matter(to: Format, license: str, base_model: str | None) -> dict[str, Any]:
    """Give the metadata that the Hub reads from a card."""
    engines = {"speculators": ["vllm"], "gguf": ["gguf"]}.get(to, ["vllm", "sglang"])
    return {
        "library_name": _LIBRARIES.get(to, "transformers"),
        "pipeline_tag": "text-generation",
        "license": license,
        **({"base_model": base_model} if base_model else {}),
        "tags": [*TAGS, *engines],
    }


def _facts(spec: DrafterSpec, target: str, weights: str) -> str:
    """Write the table of what the drafter is."""
    facts = {
        "target": f"`{as_code(target)}`",
        "block size": f"{spec.block_size}: one known token and {spec.num_draft_tokens} draft tokens",
        "target_layer_ids": f"{list(spec.target_layer_ids)}: counted from 0; the drafter reads their output",
        "mask token": str(spec.mask_token_id),
        "layers, hidden size": f"{spec.num_layers}, {spec.hidden_size}",
        "weights": weights,
    }
    if spec.conv_kernel_size:
        facts["convolutions"] = f"over {spec.conv_kernel_size} slots, as in DFlash2, with a candidate selector of zeros"
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items())


def _read(path: Path) -> Results | None:
    """Read results; None where there are none that can be read."""
    if not path.exists():
        return None
    try:
        return read_results(path)
    except (ValueError, OSError) as error:  # another program's file, or another version's
        print(f"the model card has no measured numbers of {path.name}: {error}", file=sys.stderr)
        return None


def _results(source: Path, drafter: Drafter, rounded_to: str | None) -> list[str]:
    """Write what was measured with these weights, and the verification lengths to serve with."""
    results, served = (_read(source.parent / name) for name in RESULT_FILES)
    sections, advice = [], []
    if isinstance(results, BenchResults):
        weights = fingerprint(drafter)
        names = [name for name, found in results.drafters.items() if found == weights]
        rows = [row for row in results.rows if row.drafter in names]
        if rows:
            sections, advice = _measured(results, rows, rounded_to), list(best_lengths(results, names))
    if isinstance(served, ServerResults):
        advice += served_lengths(served)
    return [*sections, *_advice(advice, isinstance(served, ServerResults))]


def _advice(advice: list[Advice], is_served: bool) -> list[str]:
    """Write the table of the best verification lengths."""
    if not advice:
        return []
    said = (
        "The best verification length is the number of tokens that the target checks in one pass: the known one and "
        "the draft tokens. `auto` chooses it at each step. `no gain`: decode without this drafter there."
    )
    if is_served:
        said += " Rows of servers are from `servers.json`: a server does not say which weights it drafts with."
    head = "| engine | set | T | at once | best verification length | decode_speedup |\n|---|---|---|---|---|---|"
    lines = [
        f"| {line.engine} | {as_markdown(line.set)} | {line.temperature:g} | {line.concurrency} | {line.best} | "
        f"{line.speedup} |"
        for line in advice
    ]
    return ["## Verification length", said, "\n".join([head, *lines])]


def _measured(results: BenchResults, rows: list[Row], rounded_to: str | None) -> list[str]:
    """Write the table of rows that were measured with these weights."""
    lines = [
        f"| {as_markdown(row.set)} | {row.temperature:g} | {row.width} | {with_interval(row.tau, row.tau_interval)} | "
        f"{with_interval(row.decode_speedup, row.decode_speedup_interval)} | {row.num_same_text}/{row.num_responses} |"
        for row in rows
    ]
    place = f"{as_markdown(results.hardware.device)} ({results.hardware.cores} cores)"
    measured = (
        f"Measured with {as_markdown(results.engine)} in {as_markdown(results.dtype)} on {place}, at most "
        f"{results.max_new_tokens} tokens a response. tau: tokens emitted per verification. decode_speedup: tokens a "
        "second over plain decoding (the baseline) of the same prompts. In brackets: 95 % intervals over prompts"
        + as_markdown(copied_note(rows, start="; "))
        + "."
    )
    if rounded_to:
        measured += f" The weights here are {rounded_to}, rounded from those that were measured."
    head = "| set | T | width | tau | decode_speedup | same text |\n|---|---|---|---|---|---|"
    return ["## Results", measured, "\n".join([head, *lines])]


def _recipe(source: Path, objective_sha256: object) -> list[str]:
    """Repeat the recipe of `dpace train`, without the places of files, and name the objective."""
    problems: dict[str, str] = {}
    recipe = read_recipe(source, problems)
    for problem in problems.values():
        print(f"the model card has no recipe: {source / 'recipe.yaml'}: {problem}", file=sys.stderr)
    kept = {name: recipe[name] for name in ("respond", "drafter", "loss", "train") if name in recipe}
    if not kept:
        return []
    objective = mapping(recipe.get("loss")).get("objective")
    sentence = f"Trained by dpace, objective `{as_code(str(objective))}`"
    if objective == "dpace":
        sentence += " ([D-PACE](https://arxiv.org/abs/2605.18810))"
    if objective_sha256:
        sentence += f" (source: sha256 `{as_code(str(objective_sha256))}`)"
    text = yaml.safe_dump(kept, sort_keys=False).replace("```", "~~~")
    return ["## Recipe", f"{sentence}.", f"```yaml\n{text}```"]
