"""Which objective drafts best? Varied text, budgets a factor of four apart, blocks of 8 and 16, several seeds.

    python benchmarks/study.py --data FOLDER --dry-run
    python benchmarks/study.py --data FOLDER --blocks 8 --steps 100 --seeds 0
    python benchmarks/study.py --data FOLDER --objectives growing-blocks

FOLDER has JSONL files with `turns`: `gsm8k_train`, `math_train` and `mbpp_train` to train on, `gsm8k`, `math500` and
`mbpp` to measure on. The demo's notes are the fourth kind of text. Where FOLDER has `apart.jsonl`, its prompts are
measured too and stand in a column of their own: no other number, and so no choice, looks at them.

Trains `dflash`, `dpace` and the objectives that are named, all by default, with all blocks, budgets and seeds, and then
writes tables of all that is there. `growing-blocks:drafter.num_layers=3` is an objective with another
option of drafter, loss or training; there may be several, each after a colon. It takes hours and may be killed at any
time: the same command goes on.
`--scale 0.01` is a miniature that shows that everything works, and no more; give it an `--output` of its own.
`--products bfloat16` trains with products in bf16, as on a GPU: about 1.8 times as many steps a second on a CPU with
units for them, such as AMX.

`--prompts FILE` trains on other prompts, such as the 6,005 of `box_prompts.py`, where data do not run out. All studies
measure on the same prompts. `--more-prompts FILE` trains on FILE too, such as what `dpace prompts` writes.
"""

import copy
import json
import math
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from box_prompts import demo_rows
from study_report import ALWAYS, APART, Cell, find_cells, write_report

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import keep_on_disk
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.objective import make_weigh, with_objective
from dpace.prompts.prompts import split_prompts
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.respond.answering import write_responses
from dpace.studies.compare import heldout_set, measure_cells, train_cells
from dpace.system.ledger import lock_folder, read_jsonl, write_json, write_text
from dpace.target import Target
from dpace.training.run import Run, choose_conversations
from dpace.verbs import load_target

LILICORR = {"drafter.selector": "lilicorr", "drafter.selector_candidates": 8}
GROWING = {"train.grow_blocks": True}
TAPS = {"drafter.conv_kernel_size": 2}
BIGRAMS = {"drafter.selector": "markov_head", "drafter.causal": True, "drafter.num_features": 5}
BV = {"loss.alpha": 1.0, "loss.alpha_end": 0.0}
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "dflash": ("dflash", {}),
    "dpace": ("dpace", {}),
    "dpace-0.3": ("dpace", {"loss.alpha": 0.3}),
    "dpace+kl": ("dpace+kl", {}),
    "dpace+kl+overlap": ("dpace+kl+overlap", {}),
    "spec-auf": ("spec-auf", {}),
    "vat": ("vat", {}),
    "bv": ("bv", BV),
    "growing-blocks": ("dpace", GROWING),
    "dflash-growing-blocks": ("dflash", GROWING),
    "bv-growing-blocks": ("bv", BV | GROWING),
    "two-taps": ("dpace", TAPS),
    "dflash-head": ("dflash", LILICORR),
    "dpace-head": ("dpace", LILICORR),
    "growing-head": ("dpace", LILICORR | GROWING),
    "growing-head-4": ("dpace", LILICORR | GROWING | {"drafter.selector_candidates": 4}),
    "growing-selector": ("dpace", GROWING | {"drafter.selector": "candidate_selector"}),
    "growing-bigrams": ("dpace", GROWING | BIGRAMS),
}
"""By the study's names: the objective, as `dpace compare` takes it, and other changes of the recipe."""
KINDS = {
    # kind: file to train on, file to measure on, prompts to train and validate on, prompts to measure on
    "notes": (None, None, 600, 40),
    "problems": ("gsm8k_train", "gsm8k", 600, 40),
    "mathematics": ("math_train", "math500", 600, 40),
    "code": ("mbpp_train", "mbpp", 370, 40),
}
MAX_CHARACTERS = 600
"""Longest prompt: long ones cost much, and their answers are cut at the same length."""
STEP_SECONDS = {8: 0.5, 16: 0.85}
"""On two quiet cores of an AMD EPYC, without a selector, for `--dry-run`."""
NUM_VALIDATION = 24


@dataclass(frozen=True)
class Options:
    """What a study trains and measures."""

    data: Path | None = None
    """Folder with the prompts."""
    output: Path | None = None
    """Folder of answers, features, drafters and report; dpace-study by default."""
    objectives: tuple[str, ...] = tuple(CANDIDATES)
    """Names of candidates; each may be followed by options that it changes."""
    blocks: tuple[Literal[8, 16], ...] = (8, 16)
    """Their sizes."""
    steps: tuple[int, ...] = (25, 100, 400)
    """The budgets."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""
    scale: float = 1.0
    """Of the numbers of prompts and steps."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products while training."""
    target: str | None = None
    """Another target than the recipe's."""
    prompts: Path | None = None
    """JSONL file of prompts to train on, in place of those of `--data`."""
    more_prompts: Path | None = None
    """JSONL file of prompts to train on, beside the others."""
    max_new_tokens: int | None = None
    """Longest answer, by default the recipe's 96 tokens."""
    num_evals: int = 1
    """How often tau on validation prompts is written to a drafter's log. `dpace train` keeps the best."""
    dry_run: bool = False
    """Say how much there is to do, and stop."""


class Plan:
    """The options of a call, and the recipe that its drafters share."""

    def __init__(self, options: Options):
        recipe = read_recipe(RECIPES["study-cpu"])
        self.options = options
        self.output = options.output or Path(recipe.output)
        paths = {"path": str(self.output / "prompts.jsonl"), "heldout_path": str(self.output / "heldout.jsonl")}
        max_new_tokens = options.max_new_tokens or recipe.respond.max_new_tokens
        self.recipe = replace(
            recipe,
            target=options.target or recipe.target,
            output=str(self.output),
            prompts=replace(recipe.prompts, **paths, num_validation=NUM_VALIDATION),
            respond=replace(recipe.respond, max_new_tokens=max_new_tokens),
            train=replace(recipe.train, products=options.products),
        )

    @property
    def cells(self) -> list[Cell]:
        """What is asked for, seed by seed."""
        names = dict.fromkeys([*ALWAYS, *self.options.objectives])
        budgets = [self.scaled(number) for number in self.options.steps]
        return [
            Cell(name, block, steps, seed)
            for seed in self.options.seeds
            for block in self.options.blocks
            for steps in budgets
            for name in names
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What all drafters of a study share."""
        options = self.options
        shared = {"scale": options.scale, "products": options.products}
        if options.prompts is not None:
            shared |= {"prompts": options.prompts.name, "max-new-tokens": self.recipe.respond.max_new_tokens}
        if options.more_prompts is not None:
            shared |= {"more-prompts": options.more_prompts.name}
        return shared

    def scaled(self, number: int, least: int = 1) -> int:
        """Scale a number of prompts or steps."""
        return max(least, round(number * self.options.scale))

    def folder(self, cell: Cell) -> Path:
        """Name the folder of a cell."""
        return self.output / "cells" / cell.objective / f"block-{cell.block}/steps-{cell.steps}/seed-{cell.seed}"

    def recipe_of(self, cell: Cell) -> Recipe:
        """Make the recipe of a cell."""
        name, *given = cell.objective.split(":")
        objective, changes = CANDIDATES[name]
        changes = changes | dict(map(read_change, given))
        eval_steps = math.ceil(cell.steps / self.options.num_evals)
        recipe = replace(
            self.recipe,
            drafter=replace(self.recipe.drafter, block_size=cell.block),
            loss=with_objective(self.recipe.loss, objective),
            train=replace(self.recipe.train, max_steps=cell.steps, eval_steps=eval_steps, seed=cell.seed),
        )
        for option, value in changes.items():
            group, _, name = option.partition(".")
            recipe = replace(recipe, **{group: replace(getattr(recipe, group), **{name: value})})
        make_weigh(recipe.loss, cell.block)
        return recipe


def read_change(text: str) -> tuple[str, Any]:
    """Read `drafter.num_layers=3` as an option of a recipe and its value."""
    option, _, value = text.partition("=")
    group, _, name = option.partition(".")
    if group not in ("drafter", "loss", "train") or name not in vars(getattr(Recipe(), group)):
        sys.exit(f"{text} is no option of drafter, loss or train with a value, such as drafter.num_layers=3")
    return option, yaml.safe_load(value)


def write_prompts(plan: Plan) -> None:
    """Choose the prompts of every kind, and write them."""
    rows: dict[str, list[dict]] = {"train": [], "heldout": []}
    for kind, (train_file, heldout_file, num_train, num_heldout) in KINDS.items():
        if plan.options.prompts is None:
            rows["train"] += rows_of(plan, kind, "train", train_file, plan.scaled(num_train, 8))
        rows["heldout"] += rows_of(plan, kind, "heldout", heldout_file, plan.scaled(num_heldout, 3))
    for path in filter(None, (plan.options.prompts, plan.options.more_prompts)):
        rows["train"] += [row for _, row in read_jsonl(path)]
    if plan.options.data is not None and (plan.options.data / f"{APART}.jsonl").exists():
        rows["heldout"] += rows_of(plan, APART, "heldout", APART, plan.scaled(40, 3))
    for part, name in (("train", "prompts.jsonl"), ("heldout", "heldout.jsonl")):
        write_text(plan.output / name, "".join(json.dumps(row) + "\n" for row in rows[part]))


def rows_of(plan: Plan, kind: str, part: str, file: str | None, count: int) -> list[dict[str, Any]]:
    """Draw different prompts, not too long, from a file of the data folder; notes are made."""
    if file is None:
        chosen = [row["messages"] for row in demo_rows(kind, part, count)]
    elif plan.options.data is None:
        sys.exit(f"--data is missing; name the folder that has {file}.jsonl")
    else:
        lines = (plan.options.data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = dict.fromkeys(json.loads(line)["turns"][0] for line in lines)
        short = [text for text in texts if len(text) <= MAX_CHARACTERS]
        drawn = random.Random(0).sample(short, min(count, len(short)))
        chosen = [[{"role": "user", "content": text}] for text in drawn]
    return [{"id": f"{kind}/{part}/{i}", "set": kind, "messages": messages} for i, messages in enumerate(chosen)]


def refuse_other_study(plan: Plan) -> None:
    """Refuse an output folder whose study has other sizes, or was trained otherwise."""
    path = plan.output / "study.json"
    found = json.loads(path.read_text()) if path.exists() else plan.settings
    for name in found | plan.settings:
        value = plan.settings.get(name)
        if found.get(name) != value:
            sys.exit(f"{plan.output} holds a study with --{name} {found.get(name)}, not {value}; name another --output")


def make_sets(
    plan: Plan, recipe: Recipe, target: Target, *, with_head_input: bool
) -> tuple[tuple[ResponseDataset, ResponseDataset], ResponseDataset]:
    """Let the target answer, and make the datasets to train, to validate and to measure on, with features."""
    if plan.options.data is not None or not (plan.output / "prompts.jsonl").exists():
        write_prompts(plan)
    parts = split_prompts(recipe.prompts)
    prompts = [prompt for part in parts for prompt in part]
    responses = write_responses(target, prompts, plan.output / "responses.jsonl", recipe.respond)
    by_id = {response.id: response for response in responses}
    train, validation, heldout = ([by_id[prompt.id] for prompt in part] for part in parts)
    datasets = choose_conversations(train, validation, recipe)
    test_set = heldout_set(heldout, recipe)
    layer_ids = Drafter.layer_ids(target, recipe.drafter)
    config = replace(recipe.train, feature_files=str(plan.output / "features"))
    for dataset in (*datasets, test_set):
        is_trained_on = dataset is datasets[0]
        keep_on_disk(target, dataset, layer_ids, config, with_head_input=with_head_input and is_trained_on)
    return datasets, test_set


def run_cells(plan: Plan, cells: Sequence[Cell]) -> None:
    """Train and measure the cells, one after the other."""
    target = load_target(plan.recipe)
    write_json(plan.output / "study.json", plan.settings)
    has_soft_labels = any(plan.recipe_of(cell).needs_target_hidden for cell in cells)
    sets = {}  # by the layers whose hidden states are kept
    for number, cell in enumerate(cells, start=1):
        print(f"cell {number} of {len(cells)}")
        folder, recipe = plan.folder(cell), plan.recipe_of(cell)
        layers = tuple(Drafter.layer_ids(target, recipe.drafter))
        if layers not in sets:
            sets[layers] = make_sets(plan, recipe, target, with_head_input=has_soft_labels)
        (train, validation), test_set = sets[layers]
        dataset = copy.copy(train)
        dataset.num_anchors = recipe.train.num_anchors
        train_cells(target, {folder: Run(recipe)}, (dataset, validation))
        measure_cells(target, recipe, [folder], test_set)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def main(options: Options) -> None:
    """Train what is missing, and write the report."""
    if unknown := [name for name in options.objectives if name.split(":")[0] not in CANDIDATES]:
        sys.exit(f"there is no objective {', '.join(unknown)}; choose from {', '.join(CANDIDATES)}")
    plan = Plan(options)
    refuse_other_study(plan)
    for cell in plan.cells:  # before any work
        Run(plan.recipe_of(cell)).is_in(plan.folder(cell))
    found = find_cells(plan.output)
    missing = [cell for cell in plan.cells if cell not in found]
    seconds = sum(cell.steps * STEP_SECONDS[cell.block] for cell in missing)
    print(f"{len(missing)} drafters to train, {seconds / 60:.0f} minutes of steps")
    if options.dry_run:
        return
    with lock_folder(plan.output):
        if missing:
            run_cells(plan, missing)
        print(f"written: {write_report(plan.output, list(CANDIDATES))}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
