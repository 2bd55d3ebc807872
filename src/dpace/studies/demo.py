"""The demo: `dpace compare` with the recipe `demo-cpu`, and what it found in a few lines."""

from dataclasses import replace

from dpace.config import CompareConfig, DemoConfig
from dpace.measure.results import BenchResults, CompareResults
from dpace.prompts.prompts import PromptParts, first_of_each_set, split_prompts
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.report.cells import percent, verdict


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


def demo_prompts(config: DemoConfig) -> PromptParts:
    """Read the demo's prompts; with `quick`, those that are decoded are held out, and no others."""
    recipe = demo_recipe(config)
    parts = split_prompts(recipe.prompts)
    if config.quick:
        parts = parts._replace(heldout=first_of_each_set(parts.heldout, recipe.bench.num_prompts))
    return parts


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
