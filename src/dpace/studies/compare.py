"""Train one recipe with several objectives and seeds, and measure which one drafts best.

A recipe, objectives and seeds come in; a drafter for each objective and seed, `results.json` and plots go out.
`dpace compare` and `dpace demo` both run this.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from dpace.batches.corpus import Corpus, read_corpora
from dpace.batches.dataset import ResponseDataset
from dpace.config import CompareConfig, LossConfig, Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.loss.objective import with_objective
from dpace.measure.benchmark import bench
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.pooling import pool_seeds
from dpace.measure.records import group_by
from dpace.measure.results import (
    HELDOUT_FILE,
    ComparedRow,
    CompareResults,
    read_heldout,
    read_log,
    refuse_other_results,
    write_heldout,
    write_results,
)
from dpace.prompts.prompts import Prompt, PromptParts, split_prompts
from dpace.report.plots import acceptance_by_slot, slot_weights, training_curves
from dpace.respond.answering import answer_prompts
from dpace.respond.responses import Response, check_meta, known_settings
from dpace.system import ranks
from dpace.system.ledger import lock_folder, read_object, refuse_foreign_files, register_files, write_text
from dpace.system.progress import note
from dpace.target import Target
from dpace.train.identity import Run, data_facts, hash_rows, target_facts
from dpace.train.run import check_recipe, choose_conversations, keep_features, train

Cell = tuple[str, int]
"""An objective and a seed."""
ALL_SETS = "all"
"""Name of all sets together, in the rows of several sets."""
FILES = ("results.json", "training.svg", "acceptance.svg", "weights.svg")
"""What `compare` writes into its folder itself."""


def compare(
    target: Target, config: CompareConfig, *, parts: PromptParts | None = None, init: Drafter | None = None
) -> CompareResults:
    """Train every objective with every seed, measure all on the same held-out prompts, and write results.

    For a seed, all objectives start from the same weights and see the same batches and anchors. Tau is the walk over
    the held-out responses, which only measure; where the target drew them, it is that of the rule `equality` at their
    temperature. `decode_speedup` is measured by decoding with the drafters of the first seed (`bench.num_prompts` of
    each set; 0 leaves it out). A finished cell is kept: the same call goes on after it.

    Writes into the output folder: `responses.jsonl`, `OBJECTIVE/seed-N/` with each drafter, its log and `heldout.json`,
    `decode/` with the results of decoding, `results.json`, and the drawings `training.svg`, `acceptance.svg` and
    `weights.svg`.

    Disk: each cell is a drafter and at most two checkpoints, so seven times its fp32 size.

    Args:
        target: the model.
        config: recipe, objectives, seeds and baseline.
        parts: the prompts; by default all of the config's.
        init: a drafter that all start from, see `train`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: see `check_output`; or another process is writing there.
        OSError: see `check_output`.
    """
    folder = Path(config.output)
    recipes = check_output(config, init)
    cells = {cell: cell_folder(folder, cell) for cell in recipes}
    with lock_folder(folder):
        ranks.from_first(lambda: register_files(folder, *FILES))
        parts = parts or split_prompts(config.prompts)
        prompts = [prompt for part in parts for prompt in part]
        answer_prompts(target, prompts, folder / "responses.jsonl", config.respond)
        *answered, heldout = read_corpora(
            folder / "responses.jsonl", [[prompt.id for prompt in part] for part in parts]
        )
        datasets = choose_conversations(*answered, recipe=next(iter(recipes.values())))
        train_cells(target, recipes, cells, datasets, init=init)
        measure_cells(target, config, cells.values(), heldout_set(heldout, config))
        rows = ranks.from_first(lambda: make_rows(cells, parts.heldout, config.baseline, config.respond.temperature))
        decode = None
        if config.bench.num_prompts != 0:
            first_seed = config.seeds[0]
            drafters = {name: load_drafter(cells[name, seed], target) for name, seed in cells if seed == first_seed}
            with lock_folder(folder / "decode"):
                decode = bench(target, drafters, parts.heldout, config.bench, folder / "decode")
        results = CompareResults(
            target=target.name,
            baseline=config.baseline,
            seeds=list(config.seeds),
            reduction=config.loss.reduction,
            rows=rows,
            decode=decode,
        )
        ranks.from_first(lambda: _write_and_draw(folder, results, cells))
    return results


def _write_and_draw(folder: Path, results: CompareResults, cells: Mapping[Cell, Path]) -> None:
    """Write `FILES`."""
    write_results(folder / "results.json", results)
    logs = {name: [read_log(cells[name, seed]) for seed in results.seeds] for name, _ in cells}
    write_text(folder / "training.svg", training_curves(logs))
    write_text(folder / "weights.svg", slot_weights(logs))
    write_text(folder / "acceptance.svg", acceptance_by_slot(results.rows))


def cell_folder(output: str | Path, cell: Cell) -> Path:
    """Return the folder of a drafter."""
    return Path(output) / cell[0] / f"seed-{cell[1]}"


def check_output(config: CompareConfig, init: Drafter | None = None) -> dict[Cell, Recipe]:
    """Refuse an output folder that cannot be written to, before any work; return the recipe of each cell.

    Raises:
        ValueError: see `make_recipes`; files that dpace did not write, results of `dpace bench`, or answers made in
            another way; or a cell that holds another run.
        OSError: a file stands where the folder is to be.
    """
    if config.respond.source == "own":
        raise ValueError(
            "--respond.source is own, and `dpace compare` measures tau on what the target answers; leave it out, or "
            "train with `dpace train`"
        )
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        folder.mkdir()  # raises the error
    refuse_foreign_files(folder, *FILES)
    refuse_other_results(folder / FILES[0], CompareResults)
    check_meta(folder / "responses.jsonl", known_settings(config.respond, thinking=config.thinking))
    recipes = make_recipes(config)
    for cell, recipe in recipes.items():
        Run(recipe, init).is_in(cell_folder(folder, cell))
    return recipes


def make_recipes(config: CompareConfig) -> dict[Cell, Recipe]:
    """Make the recipe of each cell, in the order in which they are trained.

    Raises:
        ValueError: an unknown objective, one that is named in two ways, a custom one that cannot be found or gives
            wrong weights; or see `check_recipe`.
    """
    named = replace(config.loss, token_loss="nll", confidence="token")
    if config.loss != named:
        raise ValueError(
            "--loss.token-loss and --loss.confidence are taken from the names of --objectives by `dpace compare`, such "
            "as dpace+kl+overlap; name them there instead"
        )
    losses: dict[str, LossConfig] = {}
    for name in dict.fromkeys([*config.objectives, config.baseline]):
        loss = with_objective(config.loss, name)
        if loss in losses.values():
            raise ValueError(f"the objective {name} is there under another name too; name it once")
        check_recipe(replace(config, loss=loss))
        losses[name] = loss
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})
    return {
        (name, seed): replace(recipe, loss=loss, train=replace(recipe.train, seed=seed))
        for seed in config.seeds
        for name, loss in losses.items()
    }


def train_cells(
    target: Target,
    recipes: Mapping[Cell, Recipe],
    cells: Mapping[Cell, Path],
    datasets: tuple[ResponseDataset, ResponseDataset],
    *,
    init: Drafter | None = None,
) -> None:
    """Train the drafters that are not finished.

    Args:
        target: the model.
        recipes: of each cell; all drafters read the same target layers.
        cells: the folder of each.
        datasets: of `choose_conversations`; features that they have are used, and kept here otherwise.
        init: a drafter that all start from, see `train`.
    """
    runs = {cell: Run(recipe, init) for cell, recipe in recipes.items()}
    known = data_facts(*datasets) | target_facts(target)
    for run in runs.values():
        run.facts |= known
    untrained = ranks.from_first(lambda: [cell for cell in cells if not runs[cell].is_finished_in(cells[cell])])
    dataset, measured = datasets
    if untrained and dataset.features is None:
        # One set of features for all; the target's last hidden states are kept too where any objective needs them.
        widest = max((recipes[cell] for cell in untrained), key=lambda recipe: recipe.needs_target_hidden)
        keep_features(target, *datasets, widest)
    for number, cell in enumerate(untrained, start=1):
        note(f"{number} of {len(untrained)}: {cell[0]}, seed {cell[1]}")
        seeded = dataset.with_seed(cell[1])
        train(target, seeded, measured, recipes[cell], cells[cell], init=init, run=runs[cell])


def heldout_set(heldout: Corpus | Sequence[Response], recipe: Recipe) -> ResponseDataset:
    """Make the dataset that `measure_cells` takes, without features."""
    return ResponseDataset(heldout, max_length=recipe.train.max_length, num_anchors=None, seed=0)


def measure_cells(target: Target, recipe: Recipe, folders: Iterable[Path], test_set: ResponseDataset) -> None:
    """Measure the drafters that have no heldout.json, or one of other responses.

    Args:
        target: their target.
        recipe: of any of them; all read the same target layers.
        folders: of the drafters.
        test_set: of `heldout_set`; features that it has are used, and kept here otherwise.
    """
    wanted = hash_rows(test_set)
    unmeasured = ranks.from_first(
        lambda: [f for f in folders if not (f / HELDOUT_FILE).exists() or read_heldout(f).responses_sha256 != wanted]
    )
    if unmeasured and test_set.features is None:
        layer_ids = Drafter.layer_ids(target, recipe.drafter)
        test_set.keep_features(target, layer_ids, limit_bytes=recipe.train.feature_cache_gib * 2**30)
    for folder in unmeasured:
        title = f"tau, {folder.parent.name}, {folder.name}"
        acceptance = heldout_acceptance(load_drafter(folder, target), target, test_set, over_ranks=True, title=title)
        ranks.from_first(partial(write_heldout, folder, test_set.ids, acceptance, wanted))


def make_rows(
    cells: Mapping[Cell, Path], heldout: Sequence[Prompt], baseline: str, temperature: float
) -> list[ComparedRow]:
    """Make one row for each set that has responses and objective, all seeds pooled, the best first.

    Where there are several sets, the rows of all of them together come last, as `ALL_SETS`. The responses were written
    at `temperature`.
    """
    names = list(dict.fromkeys(name for name, _ in cells))
    seeds = list(dict.fromkeys(seed for _, seed in cells))
    measured = {cell: read_heldout(folder) for cell, folder in cells.items()}
    costs = {name: _training_costs([cells[name, seed] for seed in seeds]) for name in names}
    groups = group_by(heldout, attrgetter("set"))
    if len(groups) > 1:
        groups[ALL_SETS] = list(heldout)
    rows = []
    for set_name, prompts in groups.items():
        ids = [prompt.id for prompt in prompts]
        by_seed: Any = {name: [measured[name, seed].acceptance(ids) for seed in seeds] for name in names}
        if None in by_seed[baseline]:  # no prompt of the set has a response
            continue
        of_set = [
            pool_seeds(set_name, name, len(ids), temperature, by_seed[name], by_seed[baseline], costs[name])
            for name in names
        ]
        rows += sorted(of_set, key=lambda row: -(row.tau or 0))
    return rows


def _training_costs(folders: Sequence[Path]) -> tuple[float | None, int | None]:
    """Compute the median seconds of a training step, and the peak memory in bytes, of drafters."""
    logs = [read_log(folder) for folder in folders]
    fix = "remove its folder, and the same command trains it again"
    peaks = [read_object(folder / "provenance.json", fix).get("peak_memory_bytes") for folder in folders]
    seconds = [entry["step_seconds"] for log in logs for entry in log if "step_seconds" in entry]
    return statistics.median(seconds) if seconds else None, max(filter(None, peaks), default=None)
