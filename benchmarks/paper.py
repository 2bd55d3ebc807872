"""Measure the paper's matrix: two depths, two temperatures, six sets, D-PACE and DFlash's decay, beside its averages.

    python benchmarks/paper.py OUT --prompts prompts.jsonl     # Qwen3-4B, at full size
    python benchmarks/paper.py OUT --small --data-dir DIR      # SmolLM2 on two CPU cores, within an hour

Trains what the recipes qwen3-4b-3l and -5l say, with each objective, and measures every drafter on all sets.
`--small` keeps everything but the sizes: the target, the number of training prompts and steps, blocks of 8, answers of
128 tokens, and 8 prompts of each set. DIR holds the six sets as NAME.jsonl and training prompts as NAME_train.jsonl. A
run that ended goes on where it was.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpace.config import Recipe
from dpace.drafter import load_drafter
from dpace.measure.benchmark import bench
from dpace.measure.results import BenchResults, Row
from dpace.prompts.prompts import Prompt, read_prompts
from dpace.prompts.public_sets import SETS, read_sets
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.report.sections import speeds
from dpace.report.tables import console, section_table
from dpace.respond.answering import write_responses
from dpace.target import Target
from dpace.target.locate import TARGET_ID, find_target
from dpace.train.identity import Run, data_facts, target_facts
from dpace.train.run import choose_conversations, keep_features, train

DEPTHS = (3, 5)
OBJECTIVES = ("dflash", "dpace")
PUBLISHED = {
    (3, 0.0): ((2.93, 3.20), (4.10, 4.52)),
    (5, 0.0): ((2.98, 3.27), (4.38, 4.85)),
    (3, 1.0): ((2.74, 2.96), (3.86, 4.19)),
    (5, 1.0): ((2.77, 3.03), (4.10, 4.50)),
}
"""Published averages over the six datasets with Qwen3-4B, by depth and temperature.

Each entry is speedup and tau, each of DFlash and of D-PACE.

Source: README of Lucas-TY/D-PACE, with T=1 at its commit a46ac89.
"""
NUM_RESAMPLES = 2000


def small(recipe: Recipe) -> Recipe:
    """Shrink a recipe to a size for two CPU cores, with the optimizer of the demo."""
    return replace(
        recipe,
        target=TARGET_ID,
        respond=replace(recipe.respond, max_new_tokens=128, batch_size=64),
        drafter=replace(recipe.drafter, block_size=8, num_features=3, norm_scale=0.18),
        loss=replace(recipe.loss, vocabulary="seen"),
        train=replace(
            recipe.train,
            optimizer="muon",
            learning_rate=3e-3,
            max_steps=110,
            batch_size=12,
            num_anchors=16,
            max_length=512,
            eval_steps=55,
        ),
        bench=replace(recipe.bench, max_new_tokens=96, num_prompts=8),
    )


def resample_prompts(row: Row, generator: np.random.Generator) -> list[np.ndarray]:
    """Return the places of all responses of a row, and those of each resample of its prompts, with all their turns."""
    places: dict[str, list[int]] = {}
    for place, response in enumerate(row.responses):
        places.setdefault(response.id, []).append(place)
    of_prompts = list(places.values())
    draws = generator.integers(len(of_prompts), size=(NUM_RESAMPLES, len(of_prompts)))
    return [np.arange(len(row.responses)), *(np.concatenate([of_prompts[i] for i in draw]) for draw in draws)]


def mean_over_sets(
    rows: Sequence[Row], values: Callable[[Row, np.ndarray], float], reference: Sequence[Row] = ()
) -> tuple[float, float, float]:
    """Average a statistic, or its ratio to reference rows, over sets; with the ends of its 95 % interval.

    Args:
        rows: rows of results.json, one a dataset.
        values: computes the statistic from a row and chosen responses.
        reference: rows of the same datasets and responses; resamples take the same responses.
    """
    generator = np.random.default_rng(0)
    picks = [resample_prompts(row, generator) for row in rows]

    def average(dataset_rows: Sequence[Row]) -> np.ndarray:
        values_by_row = [
            [values(row, pick) for pick in row_picks] for row, row_picks in zip(dataset_rows, picks, strict=True)
        ]
        return np.array(values_by_row).mean(0)

    averages = average(rows)
    if reference:
        averages /= average(reference)
    return (float(averages[0]), *np.quantile(averages[1:], [0.025, 0.975]).tolist())


def tau_of(row: Row, picks: np.ndarray) -> float:
    """Tau of published tables."""
    means = np.array([np.mean(r.accepted_lengths or [0]) + 1 for r in row.responses])
    return float(means[picks].mean())


def speedup_of(row: Row, picks: np.ndarray) -> float:
    """Speedup of published tables: ratio of mean seconds a token."""
    sides = [
        np.array([r.decode_seconds / max(1, r.decode_tokens) for r in side])[picks].mean()
        for side in (row.plain_responses, row.responses)
    ]
    return float(sides[0] / sides[1])


def matrix(results: dict[int, BenchResults]) -> Table:
    """Make one line for each depth, temperature and objective, beside the published averages."""
    table = Table(title="averages over the sets, 95 % intervals over prompts; published: Qwen3-4B", box=SIMPLE_HEAD)
    columns = ("layers", "T", "objective", "speedup*", "tau*", "tau* over dflash, %", "published speedup*, tau*, %")
    for heading in columns:
        table.add_column(heading, no_wrap=True)
    for depth, of_depth in results.items():
        for temperature in dict.fromkeys(row.temperature for row in of_depth.rows):
            chosen = {
                name: [
                    row
                    for row in of_depth.rows
                    if (row.drafter, row.temperature, row.width) == (name, temperature, "full")
                ]
                for name in OBJECTIVES
            }
            for number, (name, rows) in enumerate(chosen.items()):
                gain = mean_over_sets(rows, tau_of, chosen["dflash"])
                speeds, taus = PUBLISHED.get((depth, temperature), ((np.nan,) * 2,) * 2)
                known = f"{speeds[number]:.2f}, {taus[number]:.2f}, {100 * (taus[number] / taus[0] - 1):+.1f}"
                table.add_row(
                    str(depth),
                    f"{temperature:g}",
                    name,
                    "{:.2f} [{:.2f}, {:.2f}]".format(*mean_over_sets(rows, speedup_of)),
                    "{:.2f} [{:.2f}, {:.2f}]".format(*mean_over_sets(rows, tau_of)),
                    "-" if name == "dflash" else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * (x - 1) for x in gain)),
                    known,
                )
    return table


def training_prompts(options: argparse.Namespace) -> list[Prompt]:
    """Read the prompts to train on; with `--data-dir` a mixture of its training files, as much of each."""
    if options.prompts:
        return read_prompts(options.prompts)
    files = sorted(Path(options.data_dir).glob("*_train.jsonl"))
    if not files:
        raise SystemExit(f"{options.data_dir} has no *_train.jsonl; give training prompts with --prompts FILE")
    share = -(-options.num_prompts // len(files))
    return [prompt for file in files for prompt in random.Random(0).sample(read_prompts(file), share)]


def main() -> None:
    """Run the missing parts and print all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--prompts", help="JSONL file of training prompts")
    parser.add_argument("--data-dir", help="folder with the six datasets, and training prompts if --prompts is missing")
    parser.add_argument("--num-prompts", type=int, default=270, help="number of training prompts from --data-dir")
    options = parser.parse_args()
    if not options.prompts and not options.data_dir:
        parser.error("there are no training prompts: give --prompts FILE or --data-dir DIR")
    recipes = {depth: read_recipe(RECIPES[f"qwen3-4b-{depth}l"]) for depth in DEPTHS}
    if options.small:
        recipes = {depth: small(recipe) for depth, recipe in recipes.items()}
    first = recipes[DEPTHS[0]]
    target = Target.load(find_target(first.target))
    prompts = training_prompts(options)
    random.Random(1).shuffle(prompts)
    responses = write_responses(target, prompts, options.output / "responses.jsonl", first.respond)
    num_validation = min(32, len(responses) // 10)
    sets = read_sets(list(SETS), options.data_dir)
    results = {}
    for depth, recipe in recipes.items():
        folders = {name: options.output / f"{depth}l" / name for name in OBJECTIVES}
        data = choose_conversations(responses[num_validation:], responses[:num_validation], recipe)
        facts = {**target_facts(target), **data_facts(*data)}
        runs = {name: Run(replace(recipe, loss=replace(recipe.loss, objective=name))) for name in OBJECTIVES}
        for run in runs.values():
            run.facts |= facts
        missing = [name for name in OBJECTIVES if not runs[name].is_finished_in(folders[name])]
        if missing:
            keep_features(target, *data, recipe)
            for name in missing:
                train(target, *data, runs[name].recipe, folders[name], run=runs[name])
        drafters = {name: load_drafter(folder, target) for name, folder in folders.items()}
        settings = replace(recipe.bench, widths=("full",))
        results[depth] = bench(target, drafters, sets, settings, options.output / f"{depth}l")
        console().print(section_table(speeds(results[depth])))
    console().print(matrix(results))


if __name__ == "__main__":
    main()
