"""The embedded target and the main job behind `dpace demo`: prompts to a measured drafter, on a CPU, in minutes."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpace.config import Recipe
from dpace.data.ledger import write_json
from dpace.data.prompts import Prompt, first_of_each_set, split_prompts
from dpace.flags import read_recipe
from dpace.locate import TARGET_ID, find_target, find_target_gguf

NUM_SERVED = 3
"""Prompts of each set that llama.cpp decodes."""


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


def demo_recipe(config: DemoConfig) -> Recipe:
    """The recipe that the demo runs: `recipes/demo-cpu.yaml`, shortened for `quick`."""
    recipe = read_recipe(Path(str(files("dpace") / "demo" / "cpu.yaml")))
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


def run_demo(config: DemoConfig) -> dict:
    """Respond, train with each objective, measure, check, and write what was found.

    Writes into the output folder: `responses.jsonl`, one folder a drafter, `results.json`, `acceptance.png`, `weights.png`.

    Returns:
        What `results.json` holds.
    """
    from dpace.data.responses import write_responses
    from dpace.drafter import load_drafter
    from dpace.measure.benchmark import bench
    from dpace.measure.results import read_log
    from dpace.report.plots import plot_acceptance, plot_weights
    from dpace.target import Target
    from dpace.train.run import is_trained, make_datasets, train

    recipe = demo_recipe(config)
    folder = Path(recipe.output)
    parts = split_prompts(recipe.prompts)
    target = Target.load(find_target(recipe.target))
    prompts = [*parts.train, *parts.validation]
    responses = write_responses(target, prompts, folder / "responses.jsonl", recipe.respond)
    objectives = ["dpace"] if config.quick else ["dpace", "dflash"]
    recipes = {name: replace(recipe, loss=replace(recipe.loss, objective=name)) for name in objectives}
    missing = [name for name in objectives if not is_trained(folder / name, recipes[name])]
    if missing:
        count = len(parts.train)
        dataset, validation = make_datasets(target, responses[:count], responses[count:], recipe)
        for name in missing:
            train(target, dataset, validation, recipes[name], folder / name)
    drafters = {name: load_drafter(folder / name, target) for name in objectives}
    results = bench(target, drafters, parts.heldout, recipe.bench, folder)
    served = serve_in_llamacpp(target, folder / "dpace", parts.heldout, recipe)
    if served:
        results["llamacpp"] = served
        write_json(folder / "results.json", results)
    plot_acceptance(results, folder / "acceptance.png")
    plot_weights({name: read_log(folder / name) for name in drafters}, folder / "weights.png")
    return results


def serve_in_llamacpp(target: Any, folder: Path, heldout: Sequence[Prompt], recipe: Recipe) -> list[dict]:
    """Export the drafter and let llama.cpp decode a few prompts of each set with and without it.

    Returns:
        For each set: tokens a second of both, and how many texts are equal. Empty without the package `xllamacpp` or the
        target's GGUF file.
    """
    from dpace.data.chat import encode_chat
    from dpace.engines.export import export
    from dpace.engines.gguf import write_f16
    from dpace.engines.llamacpp import has_llamacpp, run_llamacpp

    target_gguf = find_target_gguf()
    if not has_llamacpp() or target_gguf is None or recipe.target != TARGET_ID:
        return []
    import torch

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
            {
                "set": name,
                "plain_tokens_per_second": speeds[0],
                "tokens_per_second": speeds[1],
                "num_same_text": sum(a.token_ids == b.token_ids for a, b in pairs),
                "num_responses": len(pairs),
                "threads": options["num_threads"],
            }
        )
    return rows


def summary(results: dict) -> list[str]:
    """What the demo found, in sentences: the text, the gain of D-PACE, and whether the drafter pays."""
    from dpace.measure.results import acceptance_of, whole_blocks
    from dpace.metrics import tau_gain
    from dpace.report.tables import percent, verdict

    same, total = (sum(row[key] for row in results["rows"]) for key in ("num_same_text", "num_responses"))
    lines = [f"lossless: {same} of {total} responses are the target's own text, token for token"]
    ways = {"full": "the D-PACE drafter alone", "auto": "what `dpace generate` does, drafts and copies of the text,"}
    for row in results["rows"]:
        if row["drafter"] == "dpace" and row["width"] in ways and row["temperature"] == 0:
            words = {"pays": "makes decoding faster", "slower": "does not pay"}
            found = words.get(verdict(row["decode_speedup_interval"]), "has no clear effect")
            speed = f"decode_speedup {row['decode_speedup']:.2f}, T=0"
            lines.append(f"{row['set']}: {ways[row['width']]} {found} ({speed})")
    by_name = {(row["set"], row["drafter"]): row for row in whole_blocks(results) if row["temperature"] == 0}
    for (name, drafter), row in by_name.items():
        if drafter == "dpace" and (name, "dflash") in by_name:
            gain = tau_gain([acceptance_of(row)], [acceptance_of(by_name[name, "dflash"])])
            lines.append(f"{name}: tau of D-PACE over DFlash's decay {percent(gain)}, T=0")
    for row in results.get("llamacpp", []):
        speeds = row["tokens_per_second"], row["plain_tokens_per_second"]
        found = "pays" if speeds[0] > speeds[1] else "does not pay"
        lines.append(
            f"{row['set']}: in llama.cpp (f16, {row['threads']} threads) the D-PACE drafter {found}: {speeds[0]:.1f} tokens/s, "
            f"{speeds[1]:.1f} without; {row['num_same_text']} of {row['num_responses']} texts equal"
        )
    return lines
