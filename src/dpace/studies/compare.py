"""Train one recipe with several objectives and seeds, and measure which one drafts best.

A recipe, objectives and seeds come in; a drafter for each objective and seed, and `results.json`, go out. `dpace
compare` and `dpace demo` both run this.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from operator import attrgetter
from pathlib import Path

from dpace.batches.dataset import ResponseDataset
from dpace.config import CompareConfig, LossConfig, Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.loss.objective import with_objective
from dpace.measure.benchmark import bench, drafted_facts
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.records import group_by_set
from dpace.measure.results import (
    HELDOUT_FILE,
    ComparedRow,
    CompareResults,
    defined,
    nullable,
    read_heldout,
    refuse_other_results,
    write_heldout,
    write_results,
)
from dpace.metrics import tau_gain
from dpace.prompts.prompts import Prompt, PromptParts, split_prompts
from dpace.respond.answering import answer_prompts
from dpace.respond.responses import Example, Response, check_meta, known_settings, read_examples
from dpace.system import ranks
from dpace.system.ledger import lock_folder, refuse_foreign_files, refuse_link, register_files
from dpace.system.progress import note
from dpace.target import Target
from dpace.training.run import (
    Run,
    choose_conversations,
    data_facts,
    hash_rows,
    keep_features,
    target_facts,
    train,
)

RESULTS_FILE = "results.json"
"""What `compare` writes into its folder itself."""


def compare(
    target: Target, config: CompareConfig, *, parts: PromptParts | None = None, init: Drafter | None = None
) -> CompareResults:
    """Train every objective with every seed, measure all on the same held-out prompts, and write results.

    For a seed, all objectives start from the same weights and see the same batches and anchors. Tau is the walk over
    the held-out responses, which only measure; where the target drew them, it is the tau of the rule `equality` at
    their temperature. `decode_speedup` is measured by decoding with the drafters of the first seed
    (`bench.num_prompts` of each set; 0 leaves it out). A finished drafter is kept: the same call goes on after it.

    Writes into the output folder: `responses.jsonl`, `OBJECTIVE/seed-N/` with each drafter, its log and `heldout.json`,
    `decode/` with the results of decoding, and `results.json`.

    Disk: each drafter has at most two checkpoints beside it, so seven times its fp32 size.

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
    runs = check_output(config, init)
    with lock_folder(folder):
        ranks.from_first(lambda: register_files(folder, RESULTS_FILE))
        parts = parts or split_prompts(config.prompts)
        answer_prompts(target, sum(parts, []), config.responses_path, config.respond)
        *answered, heldout = read_examples(config.responses_path, parts)
        train_cells(target, runs, choose_conversations(*answered, recipe=config))
        measure_cells(target, config, runs, heldout_set(heldout, config))
        rows = ranks.from_first(lambda: make_rows(config, parts.heldout))
        decode = None
        if config.bench.num_prompts != 0:
            drafters = {}
            for objective in objectives_of(config):
                drafters[objective] = load_drafter(cell_folder(config, objective, config.seeds[0]), target)
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
        ranks.from_first(lambda: write_results(folder / RESULTS_FILE, results))
    return results


def objectives_of(config: CompareConfig) -> list[str]:
    """Return the names of all objectives, the baseline included."""
    return list(dict.fromkeys([*config.objectives, config.baseline]))


def cell_folder(config: CompareConfig, objective: str, seed: int) -> Path:
    """Return the folder of a drafter; not every disk takes the colon of `package.module:function`."""
    return Path(config.output) / objective.replace(":", "-") / f"seed-{seed}"


def check_output(config: CompareConfig, init: Drafter | None = None) -> dict[Path, Run]:
    """Refuse an output folder that cannot be written to, before any work; return the run of each drafter's folder.

    Raises:
        ValueError: see `make_runs`; links, files that dpace did not write, results of `dpace bench`, or answers made in
            another way; or a drafter's folder that holds another run.
        OSError: a file stands where the folder is to be.
    """
    if config.respond.source == "own":
        raise ValueError(
            "--respond.source is own, and `dpace compare` measures tau on what the target answers; leave it out, or "
            "train with `dpace train`"
        )
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        folder.mkdir()  # raises the error that names the file
    refuse_foreign_files(folder, RESULTS_FILE)
    refuse_link(folder / "decode")
    refuse_other_results(folder / RESULTS_FILE, CompareResults)
    check_meta(config.responses_path, known_settings(config.respond, thinking=config.thinking))
    runs = make_runs(config, init)
    for cell, run in runs.items():
        refuse_link(cell.parent)
        run.is_in(cell)
    return runs


def make_runs(config: CompareConfig, init: Drafter | None) -> dict[Path, Run]:
    """Make the run of each objective and seed by its folder, in the order in which they are trained.

    Raises:
        ValueError: an unknown objective, one that is named in two ways, a custom one that cannot be found or gives
            wrong weights; or see `Run`.
    """
    # An objective's name has its token loss and confidence; the options of the same meaning must be the defaults.
    if config.loss != replace(config.loss, token_loss="nll", confidence="token"):
        raise ValueError(
            "--loss.token-loss and --loss.confidence are taken from the names of --objectives by `dpace compare`, such "
            "as dpace+kl+overlap; name them there instead"
        )
    losses: dict[str, LossConfig] = {}
    for objective in objectives_of(config):
        loss = with_objective(config.loss, objective)
        if loss in losses.values():
            raise ValueError(f"the objective {objective} is there under another name too; name it once")
        losses[objective] = loss
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})
    runs = {}
    # Seed by seed: where training is interrupted, all objectives have about as many seeds.
    for seed, (objective, loss) in product(config.seeds, losses.items()):
        recipe_of_cell = replace(recipe, loss=loss, train=replace(recipe.train, seed=seed))
        runs[cell_folder(config, objective, seed)] = Run(recipe_of_cell, init)
    return runs


def train_cells(target: Target, runs: Mapping[Path, Run], datasets: tuple[ResponseDataset, ResponseDataset]) -> None:
    """Train the drafters that are not finished.

    Args:
        target: the model.
        runs: by the folder of each drafter; all of them read the same target layers.
        datasets: of `choose_conversations`; features that they have are used, and kept here otherwise.
    """
    known = data_facts(*datasets)
    for run in runs.values():
        run.facts |= known | target_facts(target, run.recipe)
    untrained = ranks.from_first(lambda: [cell for cell, run in runs.items() if not run.is_finished_in(cell)])
    dataset, validation = datasets
    if untrained and dataset.features is None:
        # One set of features for all; the target's last hidden states are kept too where any objective needs them.
        recipes = [runs[cell].recipe for cell in untrained]
        keep_features(target, *datasets, max(recipes, key=attrgetter("needs_target_hidden")))
    for number, cell in enumerate(untrained, start=1):
        note(f"{number} of {len(untrained)}: {cell.parent.name}, {cell.name}")
        run = runs[cell]
        # The features are shared; only the anchors are drawn anew.
        seeded = dataset.with_seed(run.recipe.train.seed)
        train(target, seeded, validation, run.recipe, cell, init=run.init, run=run)


def heldout_set(heldout: Sequence[Example | Response], recipe: Recipe) -> ResponseDataset:
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
    responses_sha256 = hash_rows(test_set)

    def is_measured(folder: Path) -> bool:
        """Whether a folder has results of these very responses."""
        return (folder / HELDOUT_FILE).exists() and read_heldout(folder).responses_sha256 == responses_sha256

    unmeasured = ranks.from_first(lambda: [folder for folder in folders if not is_measured(folder)])
    if unmeasured and test_set.features is None:
        layer_ids = Drafter.layer_ids(target, recipe.drafter)
        test_set.keep_features(target, layer_ids, limit_bytes=recipe.train.feature_cache_gib * 2**30)
    for folder in unmeasured:
        title = f"tau, {folder.parent.name}, {folder.name}"
        acceptance = heldout_acceptance(load_drafter(folder, target), target, test_set, title=title)
        ranks.from_first(partial(write_heldout, folder, test_set.ids, acceptance, responses_sha256))


def make_rows(config: CompareConfig, heldout: Sequence[Prompt]) -> list[ComparedRow]:
    """Make one row for each set that has responses and objective, all seeds pooled, the best first."""
    measured = {}
    for objective in objectives_of(config):
        measured[objective] = [read_heldout(cell_folder(config, objective, seed)) for seed in config.seeds]
    rows = []
    for set_name, prompts in group_by_set(heldout).items():
        ids = [prompt.id for prompt in prompts]
        baseline = [of_seed.acceptance(ids) for of_seed in measured[config.baseline]]
        if None in baseline:  # no prompt of the set has a response
            continue
        rows_of_set = []
        for objective, seeds in measured.items():
            acceptances = [of_seed.acceptance(ids) for of_seed in seeds]
            row = ComparedRow(
                set=set_name,
                num_prompts=len(acceptances[0].rows),
                temperature=config.respond.temperature,
                drafter=objective,
                **drafted_facts(acceptances),
                tau_by_seed=[defined(acceptance.tau) for acceptance in acceptances],
                gain=nullable(tau_gain(acceptances, baseline)),
            )
            rows_of_set.append(row)
        # Without a verification tau is None, and the row comes last.
        rows += sorted(rows_of_set, key=lambda row: -(row.tau[0] or 0))
    return rows
