"""Which objective drafts best? Varied text, three budgets a factor of four apart, blocks of 8 and 16, three seeds.

    python benchmarks/study.py --data FOLDER --dry-run
    python benchmarks/study.py --data FOLDER --stage screen
    python benchmarks/study.py --data FOLDER --stage final --objectives spec-auf dpace+kl
    python benchmarks/study.py --stage report

FOLDER has JSONL files with `turns`: `gsm8k_train`, `math_train` and `mbpp_train` to train on, `gsm8k`, `math500` and
`mbpp` to measure on. The demo's notes are the fourth kind of text. Where FOLDER has `apart.jsonl`, its prompts are
measured too and stand in a column of their own: no other number, and so no choice, looks at them.

- `screen` trains every candidate with one seed and the middle budget.
- `final` trains those named, `dflash` and `dpace` with all seeds and budgets.
- `costs` times steps of all in turn, on a quiet machine.
- `report` writes tables and figures of what is there.

`--dry-run` says how long a stage takes on two quiet cores. A stage takes hours and may be killed at any time: the same
command goes on. `--scale 0.01` is a miniature that shows that everything works, and no more; give it an `--output` of
its own. `--products bf16` trains with products in bf16, as on a GPU: about 1.8 times as many steps a second on a CPU
with units for them, such as AMX.
"""

import argparse
import copy
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

if not sys.stderr.isatty():  # as `dpace`: the bars of transformers fill a log, and are turned off before it is imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")

from make_prompts import make
from study_report import ALWAYS, APART, OURS, Cell, find_cells, step_seconds, write_report
from study_trials import distillation_temperature

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import keep_on_disk
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.objective import make_weigh, with_objective
from dpace.measure.results import HELDOUT_FILE
from dpace.prompts.prompts import split_prompts
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response
from dpace.studies.compare import heldout_set, measure_cells, train_cells
from dpace.system.ledger import lock_folder, write_json, write_text
from dpace.target import Target
from dpace.target.target import HEAD_INPUT
from dpace.train.identity import Run
from dpace.train.loop import TrainingLoop
from dpace.train.run import choose_conversations
from dpace.verbs import load_target


@dataclass(frozen=True)
class Candidate:
    """What is compared under a name: an objective, and other changes of the recipe, the network or the loss."""

    objective: str
    """The name that `dpace compare` takes."""
    changes: dict[str, Any] = field(default_factory=dict)
    trial: Callable[[], AbstractContextManager] = nullcontext
    """In which it is trained and measured."""


HEAD, GROWING = {"drafter.head": "lilicorr"}, {"train.grow_blocks": True}
CANDIDATES = {
    "dflash": Candidate("dflash"),
    "dpace": Candidate("dpace"),
    "dpace-0.3": Candidate("dpace", {"loss.alpha": 0.3}),
    "dpace-0.5-to-0.1": Candidate("dpace", {"loss.alpha_end": 0.1}),
    "dpace+kl": Candidate("dpace+kl"),
    "dpace+kl+overlap": Candidate("dpace+kl+overlap"),
    "spec-auf": Candidate("spec-auf"),
    "vat": Candidate("vat"),
    "16-anchors": Candidate("dpace", {"train.num_anchors": 16}),
    "growing-blocks": Candidate("dpace", {"train.grow_blocks": True}),
    "growing-blocks-0.3": Candidate("dpace", GROWING | {"loss.alpha": 0.3}),
    "dflash-growing-blocks": Candidate("dflash", {"train.grow_blocks": True}),
    "two-taps": Candidate("dpace", {"drafter.conv_kernel_size": 2}),
    "two-taps-growing-blocks": Candidate("dpace", {"drafter.conv_kernel_size": 2, "train.grow_blocks": True}),
    "dflash-head": Candidate("dflash", HEAD),
    "dflash-head-objective": Candidate("dflash", HEAD | {"loss.head_weights": "objective"}),
    "dpace-head": Candidate("dpace", HEAD),
    "dpace-head-objective": Candidate("dpace", HEAD | {"loss.head_weights": "objective"}),
    "dpace-head-walk": Candidate("dpace", HEAD | {"loss.head_weights": "walk"}),
    "growing-head": Candidate("dpace", HEAD | GROWING),
    "growing-head-4": Candidate("dpace", HEAD | GROWING | {"drafter.head_candidates": 4}),
    "growing-head-objective": Candidate("dpace", HEAD | GROWING | {"loss.head_weights": "objective"}),
    "growing-head-walk": Candidate("dpace", HEAD | GROWING | {"loss.head_weights": "walk"}),
    "dpace+kl-soft": Candidate("dpace+kl", trial=partial(distillation_temperature, 2.0)),
    "5-features": Candidate("dpace", {"drafter.num_features": 5}),
}
"""By the study's names; where a name has no objective, it is D-PACE."""
TIMED_STEPS, TIMED_ROUNDS = 5, 4
BLOCKS, SEEDS, SMALLEST_BUDGET = (8, 16), (0, 1, 2), 25
NUM_BUDGETS, NUM_USUAL = 5, 3
"""Budgets that --steps may name, and those without it."""
KINDS = {
    # kind: file to train on, file to measure on, prompts to train and validate on, prompts to measure on
    "notes": (None, None, 600, 40),
    "problems": ("gsm8k_train", "gsm8k", 600, 40),
    "mathematics": ("math_train", "math500", 600, 40),
    "code": ("mbpp_train", "mbpp", 370, 40),
}
MAX_CHARACTERS = 600
"""Longest prompt: long ones cost much, and their answers are cut at the same length."""

# Seconds on two quiet cores of an AMD EPYC, for `--dry-run`. Steps of finished cells replace
# those here.
ANSWER_SECONDS, FEATURE_SECONDS = 0.9, 0.3
STEP_SECONDS = {8: 0.5, 16: 0.85}
MEASURE_SECONDS = {8: 0.25, 16: 0.55}
STEP_COST = {"16-anchors": 2.0} | {name: 1.3 for name, candidate in CANDIDATES.items() if "+" in candidate.objective}
STEP_COST |= {name: 1.4 for name in CANDIDATES if "head" in name}
NUM_VALIDATION = 24
LIMIT_GIB = 20.0
"""Most GiB of hidden states on disk."""


@dataclass(frozen=True)
class Plan:
    """What a call is about."""

    recipe: Recipe
    output: Path
    data: Path | None
    scale: float
    products: str
    """Dtype of products while training, of --products; all measuring is in fp32."""

    @property
    def settings(self) -> dict[str, Any]:
        """What all drafters of a study share."""
        return {"scale": self.scale, "products": self.products}

    @property
    def budgets(self) -> tuple[int, ...]:
        """Optimizer steps, a factor of four apart: 25 to 6400."""
        smallest = max(1, round(SMALLEST_BUDGET * self.scale))
        return tuple(smallest * 4**number for number in range(NUM_BUDGETS))

    def sizes(self, kind: str) -> tuple[int, int]:
        """Numbers of prompts to train and to measure on."""
        _, _, train, heldout = KINDS[kind]
        return max(8, round(train * self.scale)), max(3, round(heldout * self.scale))

    def folder(self, cell: Cell) -> Path:
        """Name the folder of a cell."""
        return self.output / "cells" / cell.objective / f"block-{cell.block}/steps-{cell.steps}/seed-{cell.seed}"

    def recipe_of(self, cell: Cell) -> Recipe:
        """Make the recipe of a cell."""
        candidate = CANDIDATES[cell.objective]
        steps = {"max_steps": cell.steps, "eval_steps": cell.steps, "seed": cell.seed}
        recipe = replace(
            self.recipe,
            drafter=replace(self.recipe.drafter, block_size=cell.block),
            loss=with_objective(self.recipe.loss, candidate.objective),
            train=replace(self.recipe.train, **steps),
        )
        for option, value in candidate.changes.items():
            group, _, name = option.partition(".")
            recipe = replace(recipe, **{group: replace(getattr(recipe, group), **{name: value})})
        make_weigh(recipe.loss, cell.block)
        return recipe


def make_plan(output: Path | None, data: Path | None, scale: float, products: str = "fp32") -> Plan:
    """Read the recipe, and let its prompts be those of the study."""
    recipe = read_recipe(RECIPES["study-cpu"])
    output = output or Path(recipe.output)
    paths = {"path": str(output / "prompts.jsonl"), "heldout_path": str(output / "heldout.jsonl")}
    prompts = replace(recipe.prompts, **paths, num_validation=NUM_VALIDATION)
    train = replace(recipe.train, products={"fp32": "float32", "bf16": "bfloat16"}[products])
    return Plan(replace(recipe, output=str(output), prompts=prompts, train=train), output, data, scale, products)


def write_prompts(plan: Plan) -> None:
    """Choose the prompts of every kind, and write them."""
    rows: dict[str, list[dict]] = {"prompts.jsonl": [], "heldout.jsonl": []}
    for kind, (*files, _, _) in KINDS.items():
        for part, file, name, count in zip(("train", "heldout"), files, rows, plan.sizes(kind), strict=True):
            if file is None:
                chosen = [row["messages"] for row in make(kind, part, count)]
            else:
                chosen = [[{"role": "user", "content": text}] for text in read_texts(plan, file, count)]
            rows[name] += [
                {"id": f"{kind}/{part}/{number}", "set": kind, "messages": messages}
                for number, messages in enumerate(chosen)
            ]
    if plan.data is not None and (plan.data / f"{APART}.jsonl").exists():
        texts = read_texts(plan, APART, plan.sizes("code")[1])
        rows["heldout.jsonl"] += [
            {"id": f"{APART}/heldout/{number}", "set": APART, "messages": [{"role": "user", "content": text}]}
            for number, text in enumerate(texts)
        ]
    for name, part in rows.items():
        write_text(plan.output / name, "".join(json.dumps(row) + "\n" for row in part))


def read_texts(plan: Plan, file: str, count: int) -> list[str]:
    """Draw different prompts, not too long, from a file of the data folder."""
    if plan.data is None:
        sys.exit(f"--data is missing; name the folder that has {file}.jsonl")
    lines = (plan.data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    texts = list(dict.fromkeys(json.loads(line)["turns"][0] for line in lines))
    texts = [text for text in texts if len(text) <= MAX_CHARACTERS]
    return random.Random(0).sample(texts, min(count, len(texts)))


def choose_cells(plan: Plan, args: argparse.Namespace) -> list[Cell]:
    """List the cells of a stage, in the order in which comparisons are complete soonest."""
    if args.stage == "screen":
        names, budgets, seeds = args.objectives or list(CANDIDATES), plan.budgets[1:2], args.seeds[:1]
    else:
        names, budgets, seeds = args.objectives or [], plan.budgets, args.seeds
    names = dict.fromkeys([*ALWAYS, *names])
    budgets = [steps for steps in budgets if steps in (args.steps or plan.budgets[:NUM_USUAL])]
    if missing := sorted({*(args.steps or ())} - {*plan.budgets}):
        sys.exit(f"there are no budgets of {missing} steps; choose from {', '.join(map(str, plan.budgets))}")
    return [
        Cell(name, block, steps, seed) for seed in seeds for block in args.blocks for steps in budgets for name in names
    ]


def estimate(plan: Plan, cells: Iterable[Cell]) -> float:
    """Print how long each part takes on two quiet cores, and give the seconds that are left."""
    train, heldout = (sum(plan.sizes(kind)[part] for kind in KINDS) for part in (0, 1))
    num_validation = min(NUM_VALIDATION, train // 10)
    parts = {"answers": 0.0, "features": 0.0, "training": 0.0, "measuring": 0.0}
    if not is_answered(plan):
        parts["answers"] = (train + heldout) * ANSWER_SECONDS
    if not (plan.output / "features").exists():
        parts["features"] = (train + heldout) * FEATURE_SECONDS
    found = find_cells(plan.output)
    waiting = [cell for cell in cells if cell not in found]
    for cell in waiting:
        known = [step_seconds(folder) for other, folder in found.items() if other[:2] == cell[:2]]
        guess = STEP_SECONDS[cell.block] * STEP_COST.get(cell.objective, 1)
        parts["training"] += cell.steps * (statistics.median(known) if known else guess)
        parts["measuring"] += MEASURE_SECONDS[cell.block] * (heldout + 2 * num_validation)
    total = sum(parts.values())
    print(f"{len(waiting)} drafters to train, {train} prompts to train on, {heldout} to measure on")
    print(
        "minutes:", ", ".join(f"{name} {value / 60:.0f}" for name, value in parts.items()), f"; {total / 60:.0f} in all"
    )
    return total


def is_answered(plan: Plan) -> bool:
    """Say whether all prompts are answered."""
    meta = plan.output / "responses.meta.json"
    return meta.exists() and json.loads(meta.read_text()).get("complete") is True


def answer(plan: Plan, target: Target) -> tuple[list[Response], list[Response], list[Response]]:
    """Let the target answer the prompts: those to train on, to validate on and to measure on."""
    if plan.data is not None or not (plan.output / "prompts.jsonl").exists():
        write_prompts(plan)
    parts = split_prompts(plan.recipe.prompts)
    prompts = [*parts.train, *parts.validation, *parts.heldout]
    responses = write_responses(target, prompts, plan.output / "responses.jsonl", plan.recipe.respond)
    by_id = {response.id: response for response in responses}
    train, validation, heldout = ([by_id[prompt.id] for prompt in part] for part in parts)
    return train, validation, heldout


def refuse_other_study(plan: Plan) -> None:
    """Refuse an output folder whose study has other sizes, or was trained otherwise."""
    path = plan.output / "study.json"
    if not path.exists():
        return
    found = {"products": "fp32"} | json.loads(path.read_text())  # earlier versions knew fp32 only
    for name, value in plan.settings.items():
        if found[name] != value:
            sys.exit(f"{plan.output} holds a study with --{name} {found[name]}, not {value}; name another --output")


def make_sets(
    plan: Plan, target: Target, answers: Sequence[list[Response]], recipe: Recipe
) -> tuple[tuple[ResponseDataset, ResponseDataset], ResponseDataset]:
    """Make the datasets to train, to validate and to measure on, with their hidden states."""
    train, validation, heldout = answers
    datasets, test_set = choose_conversations(train, validation, recipe), heldout_set(heldout, recipe)
    layer_ids = Drafter.layer_ids(target, **vars(recipe.drafter))
    config = replace(recipe.train, feature_files=str(plan.output / "features"), feature_files_gib=LIMIT_GIB)
    for dataset in (*datasets, test_set):
        is_trained_on = dataset is datasets[0]  # by some with soft labels
        keep_on_disk(target, dataset, layer_ids + [HEAD_INPUT] * is_trained_on, config)
    return datasets, test_set


def run_cells(plan: Plan, target: Target, cells: Sequence[Cell]) -> None:
    """Train and measure the cells, one after the other."""
    write_json(plan.output / "study.json", plan.settings)
    answers, num_features = answer(plan, target), None
    for number, cell in enumerate(sorted(cells, key=lambda cell: "features" in cell.objective), start=1):
        folder, recipe, candidate = plan.folder(cell), plan.recipe_of(cell), CANDIDATES[cell.objective]
        if (folder / HELDOUT_FILE).exists():
            continue
        if num_features != recipe.drafter.num_features:
            num_features, datasets, test_set = recipe.drafter.num_features, None, None  # frees their hidden states
            datasets, test_set = make_sets(plan, target, answers, recipe)
        print(f"cell {number} of {len(cells)}")
        dataset = copy.copy(datasets[0])
        dataset.num_anchors = recipe.train.num_anchors
        key = (f"{cell.objective}, blocks of {cell.block}, {cell.steps} steps", cell.seed)
        with candidate.trial():
            train_cells(target, {key: recipe}, {key: folder}, (dataset, datasets[1]))
            measure_cells(target, recipe, [folder], test_set)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def time_steps(plan: Plan, target: Target, dataset: ResponseDataset, cell: Cell) -> list[float]:
    """Take a few training steps of a cell, and give the seconds of all but the first."""
    recipe, candidate = plan.recipe_of(cell), CANDIDATES[cell.objective]
    config = replace(recipe.train, max_steps=TIMED_STEPS, logging_steps=1, save_steps=TIMED_STEPS + 1)
    dataset = copy.copy(dataset)
    dataset.num_anchors = config.num_anchors
    nothing = ResponseDataset([], max_length=config.max_length, num_anchors=None, seed=0)
    with candidate.trial(), tempfile.TemporaryDirectory() as folder:
        drafter = Drafter.from_target(target, seed=0, **vars(recipe.drafter))
        timed = replace(recipe, train=config)
        weigh = make_weigh(recipe.loss, cell.block)
        loop = TrainingLoop(drafter, target, dataset, nothing, timed, weigh=weigh, checkpoints=Path(folder))
        loop.run()
    return [entry["step_seconds"] for entry in loop.state.log_history if "step_seconds" in entry][1:]


def measure_costs(plan: Plan, target: Target, names: Sequence[str], blocks: Sequence[int]) -> None:
    """Time the steps of all candidates in turn, and write `costs.json`: the median of each round over D-PACE's."""
    datasets, _ = make_sets(plan, target, answer(plan, target), plan.recipe)
    names = [
        name for name in dict.fromkeys([*ALWAYS, *names]) if "drafter.num_features" not in CANDIDATES[name].changes
    ]
    costs: dict[str, dict[str, list[float]]] = {str(block): {name: [] for name in names} for block in blocks}
    for number in range(TIMED_ROUNDS):
        for block in blocks:
            order = names[number * 5 % len(names) :] + names[: number * 5 % len(names)]
            cells = {name: Cell(name, block, plan.budgets[1], 0) for name in order}
            found = {name: statistics.median(time_steps(plan, target, datasets[0], cells[name])) for name in order}
            for name in names:
                costs[str(block)][name].append(found[name] / found[OURS])
    write_json(plan.output / "costs.json", costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("answers", "screen", "final", "costs", "report"), default="screen")
    parser.add_argument("--data", type=Path, help="folder with the prompts")
    parser.add_argument("--output", type=Path, help="folder of answers, features, drafters and report: dpace-study")
    parser.add_argument("--objectives", nargs="+", choices=CANDIDATES, help="screen: all by default")
    parser.add_argument("--blocks", nargs="+", type=int, choices=BLOCKS, default=BLOCKS)
    parser.add_argument(
        "--steps", nargs="+", type=int, help="final: these of the budgets 25, 100, 400, 1600, 6400; by default three"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of prompts and steps")
    parser.add_argument("--products", choices=("fp32", "bf16"), default="fp32", help="dtype of products while training")
    parser.add_argument("--target", help="another target than the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="say how long it takes, and stop")
    args = parser.parse_args()
    plan = make_plan(args.output, args.data, args.scale, args.products)
    if args.target:
        plan = replace(plan, recipe=replace(plan.recipe, target=args.target))
    if args.stage == "report":
        print(f"written: {write_report(plan.output, list(CANDIDATES))}")
        return
    if args.stage == "costs":
        return measure_costs(plan, load_target(plan.recipe), args.objectives or list(CANDIDATES), args.blocks)
    cells = [] if args.stage == "answers" else choose_cells(plan, args)
    refuse_other_study(plan)
    for cell in cells:  # before any work
        Run(plan.recipe_of(cell)).is_in(plan.folder(cell))
    estimate(plan, cells)
    if args.dry_run:
        return
    with lock_folder(plan.output):
        run_cells(plan, load_target(plan.recipe), cells)


if __name__ == "__main__":
    main()
