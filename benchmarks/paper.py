"""Measure the paper's matrix: two depths, two temperatures, six sets, D-PACE and DFlash's decay, beside its averages.

    python benchmarks/paper.py OUT --prompts prompts.jsonl     # Qwen3-4B, at full size
    python benchmarks/paper.py OUT --small --data-dir DIR      # SmolLM2 on two CPU cores, within an hour

Trains what the recipes qwen3-4b-3l and -5l say, with each objective, and measures every drafter on all sets.
`--small` has a small target, few prompts and steps, blocks of 8, and short answers. As the demo, it trains by Muon with
the vocabulary `seen` and a small final norm. DIR holds the six sets as NAME.jsonl and training prompts as
NAME_train.jsonl. A run that ended goes on where it was.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro

from dpace.config import Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.measure.benchmark import bench
from dpace.measure.results import BenchResults, Row
from dpace.metrics import NUM_RESAMPLES
from dpace.prompts.prompts import Prompt, read_prompts
from dpace.prompts.public_sets import read_sets
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.report.sections import percent, speeds, with_interval
from dpace.report.tables import Section, console, section_table
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.target.locate import TARGET_ID, find_target
from dpace.training.run import Run, choose_conversations, data_facts, keep_features, target_facts, train

DEPTHS = (3, 5)
OBJECTIVES = ("dflash", "dpace")
SETS = ("gsm8k", "math500", "humaneval", "mbpp", "mt_bench", "alpaca")
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


def shrink(recipe: Recipe) -> Recipe:
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


def shorten(recipe: Recipe) -> Recipe:
    """Leave two steps and a few tokens."""
    return replace(
        recipe,
        respond=replace(recipe.respond, max_new_tokens=8),
        train=replace(recipe.train, max_steps=2, eval_steps=2),
        bench=replace(recipe.bench, max_new_tokens=4, num_prompts=1),
    )


def mean_over_sets(
    rows: Sequence[Row], parts: Callable[[Row], np.ndarray], reference: Sequence[Row] = ()
) -> tuple[float, float, float]:
    """Average a statistic, or its ratio to reference rows, over sets; with the ends of its 95 % interval.

    Resamples draw prompts with all their turns.

    Args:
        rows: rows of results.json, one a dataset.
        parts: top and bottom of the statistic of a row, whose means are divided, "2 response".
        reference: rows of the same datasets and responses; resamples take the same prompts.
    """
    generator = np.random.default_rng(0)
    prompts = [np.unique([response.id for response in row.responses], return_inverse=True)[1] for row in rows]
    draws = []
    for of_row in prompts:
        number = of_row.max() + 1
        resamples = generator.integers(number, size=(NUM_RESAMPLES, number))
        draws.append(np.concatenate([np.arange(number)[None], resamples]))

    def average(dataset_rows: Sequence[Row]) -> np.ndarray:
        statistics = []
        for row, of_row, drawn in zip(dataset_rows, prompts, draws, strict=True):
            sums = np.array([np.bincount(of_row, part) for part in parts(row)])
            totals = sums[:, drawn].sum(-1)
            statistics.append(totals[0] / totals[1])
        return np.mean(statistics, 0)

    averages = average(rows)
    if reference:
        averages /= average(reference)
    return (float(averages[0]), *np.quantile(averages[1:], [0.025, 0.975]).tolist())


def tau_of(row: Row) -> np.ndarray:
    """Tau of published tables: the mean of responses' means."""
    means = [np.mean(response.accepted_lengths or [0]) + 1 for response in row.responses]
    return np.array([means, np.ones(len(means))])


def speedup_of(row: Row) -> np.ndarray:
    """Speedup of published tables: ratio of mean seconds a token."""
    sides = row.plain_responses, row.responses
    return np.array([[r.decode_seconds / max(1, r.num_decode_tokens) for r in side] for side in sides])


def matrix(results: dict[int, BenchResults]) -> Section:
    """Make one line for each depth, temperature and objective, beside the published averages."""
    lines = []
    for depth, of_depth in results.items():
        for temperature in dict.fromkeys(row.temperature for row in of_depth.rows):
            of_temperature = [row for row in of_depth.rows if row.temperature == temperature]
            chosen = {name: [row for row in of_temperature if row.drafter == name] for name in OBJECTIVES}
            speeds, taus = PUBLISHED[depth, temperature]
            for number, (name, rows) in enumerate(chosen.items()):
                ratio, low, high = mean_over_sets(rows, tau_of, chosen["dflash"])
                lines.append(
                    {
                        "objective": name,
                        "layers": str(depth),
                        "T": f"{temperature:g}",
                        "speedup*": with_interval(*mean_over_sets(rows, speedup_of)),
                        "tau*": with_interval(*mean_over_sets(rows, tau_of)),
                        "tau* over dflash": percent((ratio - 1, low - 1, high - 1)),
                        "published": f"{speeds[number]:.2f}, {taus[number]:.2f}, {taus[number] / taus[0] - 1:+.1%}",
                    }
                )
    text = "Averages over the sets, 95 % intervals over prompts. Published: speedup*, tau* and gain with Qwen3-4B."
    return Section("The paper's matrix", rows=lines, note=text)


def training_prompts(prompts: str | None, data_dir: Path | None, num_prompts: int) -> list[Prompt]:
    """Read the prompts to train on; from a folder a mixture of its training files, as much of each."""
    if prompts:
        return read_prompts(prompts)
    files = sorted(data_dir.glob("*_train.jsonl")) if data_dir else []
    if not files:
        sys.exit("there are no training prompts: give --prompts FILE, or --data-dir DIR that has *_train.jsonl")
    share = -(-num_prompts // len(files))
    by_file = {file.stem: read_prompts(file) for file in files}
    return [
        replace(prompt, id=f"{name}/{prompt.id}")
        for name, read in by_file.items()
        for prompt in random.Random(0).sample(read, min(share, len(read)))
    ]


def train_both(target: Target, recipe: Recipe, responses: Sequence[Response], folder: Path) -> dict[str, Drafter]:
    """Train with both objectives what is not finished."""
    num_validation = min(32, len(responses) // 10)
    data = choose_conversations(responses[num_validation:], responses[:num_validation], recipe)
    facts = {**target_facts(target, recipe), **data_facts(*data)}
    runs = {name: Run(replace(recipe, loss=replace(recipe.loss, objective=name))) for name in OBJECTIVES}
    for run in runs.values():
        run.facts |= facts
    missing = [name for name, run in runs.items() if not run.is_finished_in(folder / name)]
    if missing:
        keep_features(target, *data, recipe)
    for name in missing:
        train(target, *data, runs[name].recipe, folder / name, run=runs[name])
    return {name: load_drafter(folder / name, target) for name in OBJECTIVES}


def main(
    output: tyro.conf.Positional[Path],
    prompts: str | None = None,
    data_dir: Path | None = None,
    num_prompts: int = 270,
    small: bool = False,
    target: str | None = None,
    tiny: bool = False,
) -> None:
    """Run the missing parts and print all results.

    Args:
        output: folder of all files.
        prompts: JSONL file of training prompts.
        data_dir: folder with the six datasets, and training prompts if --prompts is missing.
        num_prompts: number of training prompts from --data-dir.
        small: a size for two CPU cores.
        target: another target.
        tiny: one depth, two steps and a few tokens, which show that everything works, and no more.
    """
    rows = training_prompts(prompts, data_dir, num_prompts)
    random.Random(1).shuffle(rows)
    recipes = {depth: read_recipe(RECIPES[f"qwen3-4b-{depth}l"]) for depth in DEPTHS}
    if small:
        recipes = {depth: shrink(recipe) for depth, recipe in recipes.items()}
    if tiny:
        recipes = {3: shorten(recipes[3])}
    first = recipes[DEPTHS[0]]
    loaded = Target.load(find_target(target or first.target))
    responses = write_responses(loaded, rows, output / "responses.jsonl", first.respond)
    sets = read_sets(SETS, None if data_dir is None else str(data_dir))
    results = {}
    for depth, recipe in recipes.items():
        folder = output / f"{depth}l"
        drafters = train_both(loaded, recipe, responses, folder)
        results[depth] = bench(loaded, drafters, sets, replace(recipe.bench, widths=("full",)), folder)
        console().print(section_table(speeds(results[depth])))
    console().print(section_table(matrix(results)))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
