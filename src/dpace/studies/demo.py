"""The demo: `dpace compare` with the recipe `demo-cpu`, then the best recipe that is known, and a screen of findings.

`compare` trains drafters that differ in the loss alone. The best recipe is `laptop`, on the same answers, and in about
the same time. What is decoded is its drafter.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dpace.blocks import block_sizes
from dpace.config import CompareConfig, DemoConfig, Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.drafter import size_fault
from dpace.drafter.spec import read_folder
from dpace.measure.benchmark import bench
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.results import BenchResults, CompareResults, Row, write_results
from dpace.prompts.prompts import PromptParts, demo_path, first_of_each_set, read_prompts, split_prompts
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.report.sections import percent, same_text
from dpace.report.tables import Section
from dpace.respond.answering import answer_prompts
from dpace.respond.responses import Example, read_examples
from dpace.studies.compare import (
    RESULTS_FILE,
    cell_folder,
    compare,
    heldout_set,
    make_rows,
    measure_cells,
    train_cells,
)
from dpace.system import ranks
from dpace.system.groups import group_by
from dpace.system.ledger import lock_folder
from dpace.system.progress import count, note
from dpace.target import Target
from dpace.target.locate import DRAFTERS
from dpace.training.loop import TrainingLoop
from dpace.training.run import Run, check_recipe, choose_conversations, keep_features

OBJECTIVES = ("dpace", "dflash")
BEST = "best"
"""Name of the drafter of the best recipe, and folder of its seeds."""
DECODED = "decode"
"""Folder of the results of decoding."""
KINDS = "kinds"
"""Name of the prompts for the drafter that comes with dpace, and of the folder with its results."""
OF_DPACE = "smollm2-135m"
"""Name of the drafter that comes with dpace."""
OF_EACH_KIND = 2
"""Prompts of each kind that are decoded: the table is there within a minute."""
KINDS_TOKENS = 48
"""Longest answer to them."""
QUICK = {
    "prompts": {"limit": 36},
    "train": {"max_steps": 26, "eval_steps": 26},
    "bench": {"num_prompts": 2},
}
"""Options of the recipe with `quick`."""
QUICK_HELDOUT = 8
"""Held-out prompts of each set with `quick`."""
TIMED_CONVERSATIONS = 24
"""About how many answers a step of the training is timed with."""
TIMED_SCORED = 4
"""About how many of them are scored."""


def demo_recipe(config: DemoConfig) -> CompareConfig:
    """Read the recipe that the demo compares with, `demo-cpu`, and shorten it for `quick`."""
    recipe = read_recipe(RECIPES["demo-cpu"])
    if config.prompts:
        recipe = replace(recipe, prompts=replace(recipe.prompts, path=config.prompts))
    if config.quick:
        recipe = replace(recipe, output="dpace-demo-quick")
        for group, options in QUICK.items():
            recipe = replace(recipe, **{group: replace(getattr(recipe, group), **options)})
    # What the user names goes before the recipe and before `quick`.
    recipe = replace(recipe, target=config.target or recipe.target, output=config.output or recipe.output)
    return CompareConfig(**vars(recipe), objectives=OBJECTIVES, baseline="dflash", seeds=(recipe.train.seed,))


def best_recipe(recipe: CompareConfig) -> Recipe:
    """Return the recipe `laptop`, for the demo's prompts and in as many steps, which take about as long."""
    best = read_recipe(RECIPES["laptop"])
    train = replace(best.train, **{name: getattr(recipe.train, name) for name in ("max_steps", "eval_steps", "seed")})
    return replace(best, **{name: getattr(recipe, name) for name in ("target", "output", "respond")}, train=train)


def best_folder(recipe: CompareConfig) -> Path:
    """Return the folder of the best recipe's drafter."""
    return cell_folder(recipe, BEST, recipe.train.seed)


def demo_prompts(config: DemoConfig) -> PromptParts:
    """Read the demo's prompts; with `quick`, fewer of each set are held out."""
    parts = split_prompts(demo_recipe(config).prompts)
    if config.quick:
        parts = parts._replace(heldout=first_of_each_set(parts.heldout, QUICK_HELDOUT))
    return parts


class Demo(NamedTuple):
    """What the demo measured."""

    compared: CompareResults
    """Tau of all drafters on the held-out prompts."""
    decoded: BenchResults
    """Decoding with the best drafter, and with copies alone."""


def decode_kinds(target: Target, recipe: CompareConfig) -> BenchResults | None:
    """Decode four kinds of text with the drafter that comes with dpace; None for a target of other sizes.

    Nothing is trained before. The folder `KINDS` of the output gets the results.
    """
    folder = DRAFTERS[OF_DPACE]
    if size_fault(read_folder(folder)[0], target):
        return None
    prompts = read_prompts(demo_path(KINDS))
    output = Path(recipe.output) / KINDS
    config = replace(recipe.bench, num_prompts=OF_EACH_KIND, max_new_tokens=KINDS_TOKENS)
    with lock_folder(output):
        return bench(target, {OF_DPACE: load_drafter(folder, target)}, prompts, config, output)


def announce(target: Target, recipe: CompareConfig, parts: PromptParts, decoding: float) -> None:
    """Say how long the rest of the demo takes on this machine, as measured: answer, and time a little of what follows.

    The held-out prompts are answered, which the demo needs anyway. What is trained with some of these answers is
    forgotten. Nothing is said where a demo goes on that has answers: its bars show how far it is.

    Args:
        target: the model.
        recipe: of `demo_recipe`.
        parts: of `demo_prompts`.
        decoding: seconds of `decode_kinds`, which decodes about as much as the demo does at its end.
    """
    path = recipe.responses_path
    if ranks.from_first(path.exists):
        return
    num_heldout = len(parts.heldout)
    num_prompts = sum(map(len, parts))
    of_answer = _seconds(lambda: answer_prompts(target, parts.heldout, path, recipe.respond)) / num_heldout
    *_, examples = read_examples(path, PromptParts([], [], parts.heldout))
    answered = heldout_set(examples, recipe).examples  # those with something to draft
    seconds = decoding + (num_prompts - num_heldout) * of_answer
    num_scored = len(parts.validation) + num_heldout
    for kind, num_drafters in ((recipe, len(OBJECTIVES)), (best_recipe(recipe), 1)):
        of_reading, of_step, of_scoring = _time_training(target, kind, answered)
        of_drafter = kind.train.max_steps * of_step + num_scored * of_scoring
        seconds += num_prompts * of_reading + num_drafters * of_drafter
    minutes = max(1, round(seconds / 60))
    note(f"about {count(minutes, 'minute')} more, as measured in this run")


def _time_training(target: Target, recipe: Recipe, answered: Sequence[Example]) -> tuple[float, float, float]:
    """Measure seconds of a conversation that is read, of a step, and of a conversation that is scored.

    A step is the mean of a short training, whose blocks grow as those of the recipe do.
    """
    # Spread over the sets, whose conversations have other lengths.
    some = answered[:: max(1, len(answered) // TIMED_CONVERSATIONS)]
    drafter = Drafter.from_target(target, seed=recipe.train.seed, **vars(recipe.drafter))
    sizes = block_sizes(recipe.drafter.block_size, is_growing=recipe.train.grow_blocks, is_causal=recipe.drafter.causal)
    recipe = replace(recipe, train=replace(recipe.train, max_steps=len(sizes), eval_steps=len(sizes)))
    dataset, scored = choose_conversations(some, some[:: max(1, len(some) // TIMED_SCORED)], recipe)
    reading = _seconds(lambda: keep_features(target, dataset, scored, recipe))
    loop = TrainingLoop(drafter, target, dataset, scored, recipe, weigh=check_recipe(recipe), checkpoints=Path())
    training = _seconds(lambda: [loop.take_step(batches) for batches in loop.batches_of_steps()])
    scoring = _seconds(lambda: heldout_acceptance(drafter, target, scored))
    return reading / (len(dataset) + len(scored)), training / len(sizes), scoring / len(scored)


def _seconds(work: Callable[[], object]) -> float:
    """Time some work."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run_demo(target: Target, recipe: CompareConfig, parts: PromptParts) -> Demo:
    """Train, compare and decode; the folder `DECODED` of the output gets the results of decoding.

    Raises:
        ValueError: as `dpace.studies.compare.compare`.
        OSError: as `compare`.
    """
    # Decoding is left out here: `compare` would decode with the drafters of both objectives.
    compared = compare(target, replace(recipe, bench=replace(recipe.bench, num_prompts=0)), parts=parts)
    output = Path(recipe.output)
    best, folder = best_recipe(recipe), best_folder(recipe)
    with lock_folder(output):
        *answered, heldout = read_examples(recipe.responses_path, parts)
        train_cells(target, {folder: Run(best)}, choose_conversations(*answered, recipe=best))
        measure_cells(target, best, [folder], heldout_set(heldout, best))
        rows = make_rows(replace(recipe, objectives=(*OBJECTIVES, BEST)), parts.heldout)
        compared = replace(compared, rows=rows)
        write_results(output / RESULTS_FILE, compared)
    with lock_folder(output / DECODED):
        drafters = {BEST: load_drafter(folder, target)}
        return Demo(compared, bench(target, drafters, parts.heldout, recipe.bench, output / DECODED))


def findings(demo: Demo) -> list[Section]:
    """Make what the terminal shows at the end: speeds and taus."""
    taus = []
    for name, rows in group_by(demo.compared.rows, attrgetter("set")).items():
        by_drafter = {row.drafter: row for row in rows}
        decay, dpace, best = (by_drafter[name] for name in (demo.compared.baseline, "dpace", BEST))
        cells = {
            "set": name,
            "prompts": str(decay.num_prompts),
            "decay": f"{decay.tau[0] or 0:.2f}",
            "D-PACE": f"{dpace.tau[0] or 0:.2f}",
            "over decay": percent(dpace.gain),
            "best": f"{best.tau[0] or 0:.2f}",
            "best over decay": percent(best.gain),
        }
        taus.append(cells)
    title = "Held-out prompts: tokens that one pass of the target gives (tau); gains in %"
    return [speeds(demo.decoded), Section(title, rows=taus)]


def speeds(decoded: BenchResults, title: str = "") -> Section:
    """Make the table of speeds: plain, with copies alone, and with the drafter."""
    hardware = decoded.hardware
    about = f"{Path(decoded.target).name}, {decoded.dtype}, {hardware.device}, threads {hardware.torch_threads}"
    # Copies alone are rows of their own in the results, and a column here.
    copies = {row.set: _with_speedup(row) for row in decoded.rows if row.width == "copies"}
    rows = []
    for row in decoded.rows:
        if row.width == "auto":
            cells = {
                "tokens/s": row.set,
                "plain": f"{row.plain_tokens_per_second:.0f}",
                "copies alone": copies.get(row.set, "-"),
                "with the drafter": _with_speedup(row),
                "copied": f"{row.share_copied:.0%}",
                "same text": same_text(row),
            }
            rows.append(cells)
    return Section(title or about, rows=rows)


def _with_speedup(row: Row) -> str:
    """Write tokens a second, and the speedup over plain decoding in brackets."""
    return f"{row.tokens_per_second:.0f} ({row.decode_speedup[0] or 0:.1f}x)"
