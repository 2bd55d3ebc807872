"""One recipe, several objectives and seeds in; one table out: which drafts best on the same data, batches and anchors."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from dpace.config import CompareConfig, Recipe
from dpace.data.dataset import ResponseDataset
from dpace.data.ledger import write_json
from dpace.data.prompts import Prompt, split_prompts
from dpace.data.responses import write_responses
from dpace.drafter import Drafter, load_drafter
from dpace.measure.benchmark import bench
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.results import read_log
from dpace.metrics import Acceptance, tau_gain
from dpace.objective import with_objective
from dpace.report.plots import plot_acceptance, plot_tau, plot_weights
from dpace.target import Target
from dpace.train.run import is_trained, make_datasets, train

SCHEMA_VERSION = 1


def compare(target: Target, config: CompareConfig) -> dict:
    """Train every objective with every seed, measure each on the same held-out prompts, and write what was found.

    For a seed, all objectives start from the same weights and see the same batches and anchors. Tau is the walk over the held-out
    responses, which are the target's greedy text and choose nothing. `decode_speedup` is measured by decoding with the drafters
    of the first seed (`bench.num_prompts` of each set; 0 leaves it out). A finished cell is kept: the same call goes on after it.

    Writes into the output folder: `responses.jsonl`, `OBJECTIVE/seed-N/` with each drafter, its log and `heldout.json`,
    `decode/` with the results of decoding, `results.json`, and the plots `tau.png`, `acceptance.png` and `weights.png`.

    Disk: each cell is a drafter and two checkpoints, so seven times its fp32 size.

    Args:
        target: the model.
        config: recipe, objectives, seeds and baseline.

    Returns:
        What `results.json` holds: `rows`, one for each objective and set, and `decode`.

    Raises:
        ValueError: an unknown objective, or a cell's folder with another recipe.
    """
    folder = Path(config.output)
    names = list(dict.fromkeys([*config.objectives, config.baseline]))
    losses = {name: with_objective(config.loss, name) for name in names}
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})
    recipes = {
        (name, seed): replace(recipe, loss=loss, train=replace(recipe.train, seed=seed))
        for seed in config.seeds
        for name, loss in losses.items()
    }
    parts = split_prompts(config.prompts)
    prompts = [*parts.train, *parts.validation, *parts.heldout]
    responses = write_responses(target, prompts, folder / "responses.jsonl", config.respond)
    by_id = {response.id: response for response in responses}
    answered, validation, heldout = ([by_id[p.id] for p in part if p.id in by_id] for part in parts)

    cells = {key: folder / key[0] / f"seed-{key[1]}" for key in recipes}
    missing = [key for key in cells if not is_trained(cells[key], recipes[key])]
    if missing:
        # One set of features for all; the target's last hidden states are kept with them where any objective needs them.
        widest = max((recipes[key] for key in missing), key=lambda r: r.loss.needs_target_probs)
        dataset, measured = make_datasets(target, answered, validation, widest)
    for number, key in enumerate(missing, start=1):
        print(f"{number} of {len(missing)}: {key[0]}, seed {key[1]}", file=sys.stderr)
        train(target, dataset.with_seed(key[1]), measured, recipes[key], cells[key])
    unmeasured = [path for path in cells.values() if not (path / "heldout.json").exists()]
    if unmeasured:
        test_set = ResponseDataset(heldout, max_length=config.train.max_length, num_anchors=None, seed=0)
        layer_ids = Drafter.layer_ids(target, **vars(config.drafter))
        test_set.keep_features(target, layer_ids, limit_bytes=config.train.feature_cache_gib * 2**30)
    for path in unmeasured:
        acceptance = heldout_acceptance(load_drafter(path, target), target, test_set)
        rows = {"histogram": acceptance.rows.tolist(), "num_without_bonus": acceptance.missing.tolist()}
        write_json(path / "heldout.json", {"ids": test_set.ids, "block_size": acceptance.block_size, **rows})

    results = {
        "schema_version": SCHEMA_VERSION,
        "target": target.name,
        "baseline": config.baseline,
        "seeds": list(config.seeds),
        "reduction": config.loss.reduction,
        "rows": make_rows(cells, parts.heldout, config.baseline),
        "decode": None,
    }
    if config.bench.num_prompts != 0:
        drafters = {name: load_drafter(cells[name, config.seeds[0]], target) for name in names}
        results["decode"] = bench(target, drafters, parts.heldout, config.bench, folder / "decode")
    write_json(folder / "results.json", results)
    logs = {name: [read_log(cells[name, seed]) for seed in config.seeds] for name in names}
    plot_tau(logs, folder / "tau.png")
    plot_weights({name: log[0] for name, log in logs.items()}, folder / "weights.png")
    plot_acceptance(results, folder / "acceptance.png")
    return results


def make_rows(cells: dict[tuple[str, int], Path], heldout: Sequence[Prompt], baseline: str) -> list[dict]:
    """One row for each set and objective, all seeds pooled, the best first."""
    sets = {prompt.id: prompt.set for prompt in heldout}
    names = list(dict.fromkeys(name for name, _ in cells))
    seeds = list(dict.fromkeys(seed for _, seed in cells))
    measured = {key: json.loads((path / "heldout.json").read_text()) for key, path in cells.items()}
    rows = []
    for set_name in dict.fromkeys(sets.values()):
        by_seed = {name: [_of_set(measured[name, seed], sets, set_name) for seed in seeds] for name in names}
        of_set = []
        for name in names:
            logs = [read_log(cells[name, seed]) for seed in seeds]
            provenance = [json.loads((cells[name, seed] / "provenance.json").read_text()) for seed in seeds]
            pooled = Acceptance.pooled(by_seed[name])
            of_set.append(
                {
                    "set": set_name,
                    "drafter": name,
                    "temperature": 0,
                    "num_prompts": sum(name == set_name for name in sets.values()),
                    "block_size": pooled.block_size,
                    "histogram": pooled.counts.tolist(),
                    "tau": pooled.tau,
                    "tau_interval": pooled.interval(),
                    "tau_by_seed": [acceptance.tau for acceptance in by_seed[name]],
                    "reach_rate": pooled.reach_rate.tolist(),
                    "gain": tau_gain(by_seed[name], by_seed[baseline]),
                    "gain_by_seed": [a.tau / b.tau - 1 for a, b in zip(by_seed[name], by_seed[baseline], strict=True)],
                    "step_seconds": statistics.median(
                        e["step_seconds"] for log in logs for e in log if "step_seconds" in e
                    ),
                    "peak_memory_bytes": max((p["peak_memory_bytes"] or 0 for p in provenance), default=0) or None,
                }
            )
        rows += sorted(of_set, key=lambda row: -row["tau"])
    return rows


def _of_set(measured: dict, sets: dict[str, str], set_name: str) -> Acceptance:
    """The rows of a set's prompts."""
    chosen = [i for i, prompt_id in enumerate(measured["ids"]) if sets[prompt_id] == set_name]
    histogram, missing = ([measured[key][i] for i in chosen] for key in ("histogram", "num_without_bonus"))
    return Acceptance(histogram, measured["block_size"], missing)
