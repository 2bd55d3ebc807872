"""Run the demo: from prompts to a measured drafter, on a CPU, in minutes.

It is `dpace compare` with the recipe `demo-cpu`, and it decodes with llama.cpp too where that is installed.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpace.config import CompareConfig, DemoConfig, Recipe
from dpace.engines.export import export
from dpace.engines.gguf import write_f16
from dpace.engines.llamacpp import has_llamacpp, run_llamacpp
from dpace.measure.results import BenchResults, CompareResults, LlamacppRow, write_results
from dpace.prompts.prompts import Prompt, PromptParts, first_of_each_set, split_prompts
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.report.cells import percent, verdict
from dpace.studies.compare import cell_folder, compare
from dpace.system.ledger import lock_folder
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import TARGET_ID, find_target, find_target_gguf

NUM_SERVED = 3
"""Prompts of each set that llama.cpp decodes."""


def demo_recipe(config: DemoConfig) -> CompareConfig:
    """Read the recipe that the demo compares with, `demo-cpu`, and shorten it for `quick`."""
    recipe = read_recipe(RECIPES["demo-cpu"])
    if config.prompts:
        recipe = replace(recipe, prompts=replace(recipe.prompts, path=config.prompts))
    objectives = ("dpace", "dflash")
    if config.quick:
        objectives = ("dpace",)
        recipe = replace(
            recipe,
            output="dpace-demo-quick",
            prompts=replace(recipe.prompts, limit=72),
            train=replace(recipe.train, max_steps=60, eval_steps=60),
            bench=replace(recipe.bench, num_prompts=3, max_new_tokens=64),
        )
    recipe = replace(recipe, target=config.target or recipe.target, output=config.output or recipe.output)
    return CompareConfig(**vars(recipe), objectives=objectives, baseline=objectives[-1], seeds=(recipe.train.seed,))


def drafter_folder(recipe: CompareConfig) -> Path:
    """Return the folder of the drafter that D-PACE trained."""
    return cell_folder(recipe.output, ("dpace", recipe.seeds[0]))


def demo_prompts(config: DemoConfig) -> PromptParts:
    """Read the demo's prompts; with `quick`, those that are decoded are held out, and no others."""
    recipe = demo_recipe(config)
    parts = split_prompts(recipe.prompts)
    if config.quick:
        parts = parts._replace(heldout=first_of_each_set(parts.heldout, recipe.bench.num_prompts))
    return parts


def run_demo(recipe: CompareConfig, parts: PromptParts) -> CompareResults:
    """Respond, train with each objective, measure, and write what was found, as `compare` does.

    Args:
        recipe: of `demo_recipe`.
        parts: of `demo_prompts`.

    Returns:
        What `results.json` holds; `decode.llamacpp` has what llama.cpp gave.
    """
    target = Target.load(find_target(recipe.target))
    results = compare(target, recipe, parts=parts)
    served = serve_in_llamacpp(target, drafter_folder(recipe), parts.heldout, recipe)
    if served and results.decode:
        results = replace(results, decode=replace(results.decode, llamacpp=served))
        with lock_folder(recipe.output):
            write_results(Path(recipe.output) / "results.json", results)
    return results


def serve_in_llamacpp(target: Any, folder: Path, heldout: Sequence[Prompt], recipe: Recipe) -> list[LlamacppRow]:
    """Export the drafter and let llama.cpp decode a few prompts of each set with and without it.

    Returns:
        One row a set; none without the package `xllamacpp` or the target's GGUF file.
    """
    target_gguf = find_target_gguf()
    if not has_llamacpp() or target_gguf is None or recipe.target != TARGET_ID:
        return []
    chosen = first_of_each_set(heldout, NUM_SERVED)
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in chosen]
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work:
        f16 = Path(work) / "target.gguf"
        write_f16(target_gguf, f16)
        drafter = export(
            folder,
            target,
            to="gguf",
            output=Path(work) / "dflash",
            dtype=torch.float16,
            name="dpace-dflash",
            target_name=recipe.target,
            target_gguf=target_gguf,
        )
        plain, drafted = (
            run_llamacpp(
                f16,
                prompts,
                drafter_gguf=drafter_gguf,
                num_draft_tokens=recipe.drafter.block_size - 1,
                max_new_tokens=recipe.bench.max_new_tokens,
                num_threads=threads,
            )
            for drafter_gguf in (None, drafter.path)
        )
    rows = []
    for name in dict.fromkeys(prompt.set for prompt in chosen):
        of_set = [number for number, prompt in enumerate(chosen) if prompt.set == name]
        speeds = [
            sum(len(side[i].token_ids) - 1 for i in of_set) / sum(side[i].decode_seconds for i in of_set)
            for side in (plain, drafted)
        ]
        rows.append(
            LlamacppRow(
                set=name,
                plain_tokens_per_second=speeds[0],
                tokens_per_second=speeds[1],
                num_same_text=sum(plain[i].token_ids == drafted[i].token_ids for i in of_set),
                num_responses=len(of_set),
                threads=threads,
            )
        )
    return rows


FINDINGS = {
    "faster": "makes decoding faster",
    "slower": "makes decoding slower",
    "too few prompts": "had too few prompts to tell",
}


def decoding_summary(results: BenchResults) -> list[str]:
    """Write what decoding with the D-PACE drafter gave: the text, and the speed of each set."""
    same = f"{results.num_same_text} of {results.num_responses} responses"
    lines = [f"lossless: {same} are the target's own text, token for token"]
    ways = {"full": "the D-PACE drafter alone", "auto": "`dpace generate`"}  # which drafts, and copies of the text
    for row in results.rows:
        if row.drafter == "dpace" and row.width in ways and row.temperature == 0:
            effect = FINDINGS.get(verdict(row.decode_speedup_interval), "makes no clear difference")
            speedup = f"decode_speedup {row.decode_speedup or 0:.2f}, T=0"
            lines.append(f"{row.set}: {ways[row.width]} {effect} ({speedup})")
    for row in results.llamacpp or ():
        effect = "faster" if row.tokens_per_second > row.plain_tokens_per_second else "slower"
        speeds = f"{row.tokens_per_second:.1f} tokens/s, {row.plain_tokens_per_second:.1f} without"
        same = f"{row.num_same_text} of {row.num_responses} texts equal"
        lines.append(f"{row.set}: llama.cpp (f16) is {effect} with it: {speeds}; {same}")
    return lines


def summary(results: CompareResults) -> list[str]:
    """Write what the demo found: about the text, the speed, and the gain of D-PACE over DFlash's decay on all sets.

    There is no gain where only one objective was trained.
    """
    assert results.decode, "the demo's recipe decodes"
    lines = decoding_summary(results.decode)
    ours = [row for row in results.rows if row.drafter == "dpace"]
    if len(ours) < len(results.rows):
        gain = f"tau of D-PACE over DFlash's decay {percent(ours[-1].gain)}, over prompts"
        lines.append(f"all {ours[-1].num_prompts} held-out prompts: {gain}; one seed says nothing of other seeds")
    return lines
