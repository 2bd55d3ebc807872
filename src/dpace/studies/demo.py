"""Run the demo: from prompts to a measured drafter, on a CPU, in minutes.

Options of the demo, and the recipe that follows from them.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.config import Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.engines.export import export
from dpace.engines.gguf import write_f16
from dpace.engines.llamacpp import has_llamacpp, run_llamacpp
from dpace.measure.benchmark import bench, pool_seeds
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.results import BenchResults, ComparedRow, Heldout, LlamacppRow, read_log, write_results
from dpace.prompts.prompts import Prompt, first_of_each_set, split_prompts
from dpace.recipes import RECIPES
from dpace.recipes.flags import read_recipe
from dpace.report.cells import percent, verdict
from dpace.report.plots import acceptance_by_slot, save_figures, slot_weights
from dpace.respond.responses import write_responses
from dpace.system.ledger import register_files
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import TARGET_ID, find_target, find_target_gguf
from dpace.train.identity import refuse_other_run, settings_of, target_of
from dpace.train.run import choose_conversations, describe_run, is_trained, keep_features, train


@dataclass(frozen=True)
class DemoConfig:
    """Train a drafter for a real LLM on this machine and show what it gains."""

    quick: bool = False
    """Use fewer prompts and steps, and only the objective dpace: 4 minutes at most on two cores, instead of 15."""
    prompts: str | None = None
    """JSONL file of your own prompts; the demo's prompts by default."""
    target: str | None = None
    """Folder or Hub id of the target; SmolLM2-135M-Instruct by default."""
    output: str | None = None
    """Folder that everything is written to; dpace-demo, or dpace-demo-quick with --quick, by default.

    The same command continues an interrupted run in it."""
    wide: bool = False
    """Show every column in the terminal, wider than 80 characters; the page of `dpace report` has them all."""


def demo_recipe(config: DemoConfig) -> Recipe:
    """Read the recipe that the demo runs, `demo-cpu`, and shorten it for `quick`."""
    recipe = read_recipe(RECIPES["demo-cpu"])
    output = config.output or ("dpace-demo-quick" if config.quick else recipe.output)
    recipe = replace(recipe, output=output, target=config.target or recipe.target)
    if config.prompts:
        recipe = replace(recipe, prompts=replace(recipe.prompts, path=config.prompts))
    if config.quick:
        recipe = replace(
            recipe,
            prompts=replace(recipe.prompts, limit=72),
            train=replace(recipe.train, max_steps=60, eval_steps=60),
            bench=replace(recipe.bench, num_prompts=3, max_new_tokens=64),
        )
    return recipe


ALL_SETS = "all"
"""Name of all sets together, in the rows of the held-out prompts."""
NUM_SERVED = 3
"""Prompts of each set that llama.cpp decodes."""


def run_demo(config: DemoConfig) -> BenchResults:
    """Respond, train with each objective, measure, and write what was found.

    Writes into the output folder: `responses.jsonl`, one folder a drafter, `results.json`, `acceptance.svg` and
    `weights.svg`.

    Returns:
        What `results.json` holds.
    """
    recipe = demo_recipe(config)
    folder = Path(recipe.output)
    parts = split_prompts(recipe.prompts)
    objectives = ["dpace"] if config.quick else ["dpace", "dflash"]
    recipes = {name: replace(recipe, loss=replace(recipe.loss, objective=name)) for name in objectives}
    for name in objectives:  # before any work
        refuse_other_run(folder / name, settings_of(recipes[name]))
    register_files(folder, "results.json", "acceptance.svg", "weights.svg")
    target = Target.load(find_target(recipe.target))
    prompts = [*parts.train, *parts.validation]
    responses = write_responses(target, prompts, folder / "responses.jsonl", recipe.respond)
    count = len(parts.train)
    datasets = choose_conversations(responses[:count], responses[count:], recipe)
    facts = target_of(target)
    runs = {name: describe_run(facts, *datasets, recipes[name]) for name in objectives}
    untrained = [name for name in objectives if not is_trained(folder / name, runs[name])]
    if untrained:
        keep_features(target, *datasets, recipe)
        for name in untrained:
            train(target, *datasets, recipes[name], folder / name)
    drafters = {name: load_drafter(folder / name, target) for name in objectives}
    compared = compare_heldout(target, drafters, [*prompts, *parts.heldout], parts.heldout, recipe)
    results = replace(bench(target, drafters, parts.heldout, recipe.bench, folder), heldout=compared)
    served = serve_in_llamacpp(target, folder / "dpace", parts.heldout, recipe)
    results = replace(results, llamacpp=served or None)
    write_results(folder / "results.json", results)
    save_figures(acceptance_by_slot(results.whole_blocks), folder / "acceptance.svg")
    save_figures(slot_weights({name: [read_log(folder / name)] for name in drafters}), folder / "weights.svg")
    return results


def compare_heldout(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], heldout: Sequence[Prompt], recipe: Recipe
) -> list[ComparedRow] | None:
    """Compare the objectives on all held-out prompts, by the walk through the target's own answers.

    Args:
        target: the model.
        drafters: by objective; the last is the baseline.
        prompts: all that the folder's responses.jsonl holds or will hold.
        heldout: those to compare on.
        recipe: of the demo.

    Returns:
        A row for each set and objective, then those of all sets together; None for a single objective.
    """
    if len(drafters) < 2:
        return None
    responses = write_responses(target, prompts, Path(recipe.output) / "responses.jsonl", recipe.respond)
    ids = {prompt.id for prompt in heldout}
    answered = [response for response in responses if response.id in ids]
    dataset = ResponseDataset(answered, max_length=recipe.train.max_length, num_anchors=None, seed=0)
    layer_ids = Drafter.layer_ids(target, **vars(recipe.drafter))
    dataset.keep_features(target, layer_ids, limit_bytes=recipe.train.feature_cache_gib * 2**30)
    found = {
        name: Heldout.of(dataset.ids, heldout_acceptance(drafter, target, dataset))
        for name, drafter in drafters.items()
    }
    *_, baseline = drafters
    rows = []
    for set_name in [*dict.fromkeys(prompt.set for prompt in heldout), ALL_SETS]:
        chosen = [prompt.id for prompt in heldout if set_name in (prompt.set, ALL_SETS)]
        taken = {name: of_drafter.acceptance(chosen) for name, of_drafter in found.items()}
        theirs = taken[baseline]
        if theirs is not None:  # every answer of the set may be a single token
            rows += [pool_seeds(set_name, n, len(chosen), [ours], [theirs]) for n, ours in taken.items() if ours]
    return rows


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
    options: dict[str, Any] = {"max_new_tokens": recipe.bench.max_new_tokens, "num_threads": torch.get_num_threads()}
    about: dict[str, Any] = {"name": "dpace-dflash", "target_name": recipe.target, "target_gguf": target_gguf}
    with tempfile.TemporaryDirectory() as work:
        done = export(folder, target, to="gguf", output=Path(work) / "dflash", dtype=torch.float16, **about)
        f16 = Path(work) / "target.gguf"
        write_f16(target_gguf, f16)
        plain = run_llamacpp(f16, prompts, **options)
        drafts = recipe.drafter.block_size - 1
        drafted = run_llamacpp(f16, prompts, drafter_gguf=done.path, num_draft_tokens=drafts, **options)
    rows = []
    for name in dict.fromkeys(prompt.set for prompt in chosen):
        pairs = [(a, b) for p, a, b in zip(chosen, plain, drafted, strict=True) if p.set == name]
        speeds = [
            sum(len(a.token_ids) - 1 for a in side) / sum(a.decode_seconds for a in side)
            for side in zip(*pairs, strict=True)
        ]
        rows.append(
            LlamacppRow(
                set=name,
                plain_tokens_per_second=speeds[0],
                tokens_per_second=speeds[1],
                num_same_text=sum(a.token_ids == b.token_ids for a, b in pairs),
                num_responses=len(pairs),
                threads=options["num_threads"],
            )
        )
    return rows


def summary(results: BenchResults) -> list[str]:
    """Say what the demo found: about the text, the speed, and the gain of D-PACE."""
    same, total = results.num_same_text, results.num_responses
    lines = [f"lossless: {same} of {total} responses are the target's own text, token for token"]
    ways: dict[Any, str] = {
        "full": "the D-PACE drafter alone",
        "auto": "`dpace generate`",  # drafts, and copies of the text
    }
    for row in results.rows:
        if row.drafter == "dpace" and row.width in ways and row.temperature == 0:
            words = {"faster": "makes decoding faster", "slower": "makes decoding slower"}
            words["too few prompts"] = "had too few prompts to tell"
            found = words.get(verdict(row.decode_speedup_interval), "makes no clear difference")
            lines.append(f"{row.set}: {ways[row.width]} {found} (decode_speedup {row.decode_speedup or 0:.2f}, T=0)")
    for row in results.heldout or ():
        if row.set == ALL_SETS and row.drafter == "dpace":
            found = f"tau of D-PACE over DFlash's decay {percent(row.gain)}"
            lines.append(f"all {row.num_prompts} held-out prompts: {found}")
    for row in results.llamacpp or ():
        found = "faster" if row.tokens_per_second > row.plain_tokens_per_second else "slower"
        speeds = f"{row.tokens_per_second:.1f} tokens/s, {row.plain_tokens_per_second:.1f} without"
        same = f"{row.num_same_text} of {row.num_responses} texts equal"
        lines.append(f"{row.set}: llama.cpp (f16) is {found} with it: {speeds}; {same}")
    return lines
