"""The demo: `dpace compare` with the recipe `demo-cpu`, decoding with the D-PACE drafter, and a screen of findings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dpace.config import CompareConfig, DemoConfig
from dpace.drafter import load_drafter
from dpace.drafter.drafter import size_fault
from dpace.drafter.spec import read_folder
from dpace.measure.benchmark import bench
from dpace.measure.results import BenchResults, ComparedRow, CompareResults, Row
from dpace.plan import FEW_ROWS, TrainingPlan, expected_lengths, measure_flops, plan_recipe
from dpace.prompts.prompts import PromptParts, demo_path, first_of_each_set, read_prompts, split_prompts
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.report.sections import judge_gain, percent, same_text
from dpace.report.tables import Section
from dpace.studies.compare import cell_folder, compare
from dpace.system.ledger import lock_folder
from dpace.system.progress import count
from dpace.target import Target
from dpace.target.locate import DRAFTERS
from dpace.training.run import read_run

OBJECTIVES = ("dpace", "dflash")
DECODED = ("decode", "decode-sampled")
"""Folders of the results of decoding, at temperature 0 and 1."""
KINDS = "kinds"
"""Name of the prompts for the drafter that comes with dpace, and of the folder with its results."""
OF_DPACE = "smollm2-135m"
"""Name of the drafter that comes with dpace."""
NUM_KINDS = 4
"""Kinds of text that these prompts are of."""
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
SAMPLED_PROMPTS = 2
"""Prompts of the first set that are decoded at temperature 1 too."""
MANY_COPIED = 0.1
"""Share of copied tokens from which on the demo speaks of them."""
MOST_SECONDS = 600.0
"""Longest time that the whole demo may take where nobody asks for it."""
READING = 1.25
ANSWERING = 1.1
SCORING = 2.2
DECODING = 0.024
"""Speeds of these parts, over the speed of a product, as CPUs with AVX2 and with AMX had them in slow hours.
They are high since what prompts share is read once, and a walk through an answer reaches only some slots."""
START_SECONDS = 60.0
"""Seconds in which the target is loaded, the time of passes and the checkpoints are measured, and pages written."""


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


def demo_prompts(config: DemoConfig) -> PromptParts:
    """Read the demo's prompts; with `quick`, fewer of each set are held out."""
    parts = split_prompts(demo_recipe(config).prompts)
    if config.quick:
        parts = parts._replace(heldout=first_of_each_set(parts.heldout, QUICK_HELDOUT))
    return parts


class PlannedDemo(NamedTuple):
    """A demo that may run, and how long it takes on this machine."""

    config: DemoConfig
    recipe: CompareConfig
    parts: PromptParts
    plan: TrainingPlan
    """What the training of one of its drafters takes."""
    seconds: float
    """Expected time of the whole, see `expected_seconds`."""


def demo_sizes(config: DemoConfig) -> list[DemoConfig]:
    """Return the demos that may run, the whole one first: what is asked for, else what was begun, else both.

    Raises:
        ValueError: both sizes are asked for; or see `read_run`.
    """
    if config.full and config.quick:
        raise ValueError("--quick and --full are two sizes of the demo; leave one of them out")
    sizes = [replace(config, full=True), replace(config, quick=True)]
    # A config that asks for a size is equal to it already.
    asked = [size for size in sizes if size == config]
    begun = [size for size in sizes if _is_begun(demo_recipe(size))]
    return asked or begun[:1] or sizes


def _is_begun(recipe: CompareConfig) -> bool:
    """Return whether the output folder holds a training of this recipe's length."""
    facts = read_run(cell_folder(recipe, OBJECTIVES[0], recipe.seeds[0])) or {}
    return facts.get("train.max_steps") == recipe.train.max_steps


def choose_demo(sizes: Sequence[DemoConfig]) -> PlannedDemo:
    """Plan the first of these demos that ends within `MOST_SECONDS` on this machine, else the last one.

    Raises:
        ValueError: see `plan_recipe`.
    """
    *longer, last = sizes
    for config in longer:
        planned = _plan_demo(config)
        if planned.seconds <= MOST_SECONDS:
            return planned
    return _plan_demo(last)


def _plan_demo(config: DemoConfig) -> PlannedDemo:
    """Plan a demo of one size."""
    recipe = demo_recipe(config)
    parts = demo_prompts(config)
    plan = plan_recipe(recipe, expected_lengths(parts.train, recipe))
    return PlannedDemo(config, recipe, parts, plan, expected_seconds(plan, parts))


def expected_seconds(plan: TrainingPlan, parts: PromptParts) -> float:
    """Estimate the seconds of a demo on this machine, without the download of the target.

    Operations of the products, over their speed here; answers count as long as they may be.
    """
    target = plan.target
    recipe = plan.recipe
    bench = recipe.bench
    of_layers = sum(weight.numel() for weight in target.layers.parameters())
    of_head = target.head.weight.numel()
    # Weights that are passed; each takes two operations, which are counted below.
    num_read, num_answered = expected_lengths(sum(parts, []), recipe).sum(1)
    reading = num_read * of_layers
    answering = reading + num_answered * of_head
    num_scored = expected_lengths(parts.heldout, recipe)[1].sum() * recipe.drafter.block_size
    scoring = len(OBJECTIVES) * num_scored * (plan.drafter.num_parameters() + of_head)
    # The demo's held-out prompts are two sets.
    num_decoded = 2 * len(bench.widths) * (bench.num_prompts or 0) * bench.max_new_tokens
    num_decoded += NUM_KINDS * len(bench.widths) * OF_EACH_KIND * KINDS_TOKENS
    decoding = num_decoded * (of_layers + of_head)
    of_target = 2 * (reading / READING + answering / ANSWERING + scoring / SCORING + decoding / DECODING)
    speed = measure_flops(plan.device, target.model.dtype, FEW_ROWS)
    return START_SECONDS + of_target / speed + len(OBJECTIVES) * plan.seconds_of_steps


def duration(planned: PlannedDemo) -> str:
    """Say which demo runs and how long it takes here."""
    minutes = count(max(1, round(planned.seconds / 60)), "minute")
    if planned.config.full:
        return f"the whole demo, about {minutes} on this machine; --quick is shorter"
    return f"the quick demo, about {minutes} on this machine; --full runs the whole one"


class Demo(NamedTuple):
    """What the demo measured."""

    compared: CompareResults
    """Tau of both objectives on the held-out prompts."""
    decoded: BenchResults
    """Decoding with the D-PACE drafter, and with copies alone; at temperature 1 of the first set."""


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


def run_demo(target: Target, recipe: CompareConfig, parts: PromptParts) -> Demo:
    """Train, compare and decode; the folders `DECODED` of the output get the results of decoding.

    Raises:
        ValueError: as `dpace.studies.compare.compare`.
        OSError: as `compare`.
    """
    # Decoding is left out here: `compare` would decode with the drafters of both objectives.
    compared = compare(target, replace(recipe, bench=replace(recipe.bench, num_prompts=0)), parts=parts)
    greedy, sampled = (Path(recipe.output) / name for name in DECODED)
    drafters = {"dpace": load_drafter(cell_folder(recipe, "dpace", recipe.seeds[0]), target)}
    sampling = replace(recipe.bench, temperatures=(1.0,), widths=("auto",), num_prompts=SAMPLED_PROMPTS)
    with lock_folder(greedy):
        decoded = bench(target, drafters, parts.heldout, recipe.bench, greedy)
    first_set = [prompt for prompt in parts.heldout if prompt.set == decoded.rows[0].set]
    with lock_folder(sampled):
        rows = bench(target, drafters, first_set, sampling, sampled).rows
    return Demo(compared, replace(decoded, rows=[*decoded.rows, *rows]))


def findings(demo: Demo) -> tuple[list[Section], list[str]]:
    """Make what the terminal shows at the end: speeds, taus, and remarks."""
    decoded = demo.decoded
    decay = {}
    gains = []
    for row in demo.compared.rows:
        if row.drafter == demo.compared.baseline:
            decay[row.set] = row.tau[0] or 0
        else:
            gains.append(row)
    taus = []
    for row in gains:
        cells = {
            "set": row.set,
            "prompts": str(row.num_prompts),
            "tau, decay": f"{decay[row.set]:.2f}",
            "tau, D-PACE": f"{row.tau[0] or 0:.2f}",
            "gain [95 % over prompts]": percent(row.gain),
        }
        taus.append(cells)
    title = "Held-out prompts: tokens that one pass of the target gives (tau)"
    return [speeds(decoded), Section(title, rows=taus)], list(remarks(decoded.rows, gains))


def speeds(decoded: BenchResults, title: str = "") -> Section:
    """Make the table of speeds: plain, with copies alone, and with the drafter."""
    hardware = decoded.hardware
    about = f"{Path(decoded.target).name}, {decoded.dtype}, {hardware.device}, threads {hardware.torch_threads}"
    # Copies alone are rows of their own in the results, and a column here.
    copies = {_name(row): _with_speedup(row) for row in decoded.rows if row.width == "copies"}
    rows = []
    for row in decoded.rows:
        if row.width == "auto":
            cells = {
                "tokens/s": _name(row),
                "plain": f"{row.plain_tokens_per_second:.0f}",
                "copies alone": copies.get(_name(row), "-"),
                "with the drafter": _with_speedup(row),
                "copied": f"{row.share_copied:.0%}",
                "same text": same_text(row),
            }
            rows.append(cells)
    return Section(title or about, rows=rows)


def _name(row: Row) -> str:
    """Name the set, and the temperature where it is not 0."""
    return row.set if row.temperature == 0 else f"{row.set}, T={row.temperature:g}"


def _with_speedup(row: Row) -> str:
    """Write tokens a second, and the speedup over plain decoding in brackets."""
    return f"{row.tokens_per_second:.0f} ({row.decode_speedup[0] or 0:.1f}x)"


def remarks(rows: Sequence[Row], gains: Sequence[ComparedRow]) -> Iterator[str]:
    """Say how much of the speed comes from copies, and why something is slower or worse."""
    drafted = [row for row in rows if row.width == "auto"]
    # The sets that were decoded with copies alone too: there the table shows what copies gain.
    with_copies = {_name(row) for row in rows if row.width == "copies"}
    copying = [_name(row) for row in drafted if _name(row) in with_copies and row.share_copied >= MANY_COPIED]
    if copying:
        yield f"{'; '.join(copying)}: many tokens were copied from the text before, which needs no drafter."
    slower = [_name(row) for row in drafted if (row.decode_speedup[0] or 1) < 1]
    if slower:
        yield (
            f"{'; '.join(slower)}: slower than plain decoding, since trying drafts took more time than the accepted "
            "ones saved. Longer training, or more prompts, gives better drafts."
        )
    worse = [row.set for row in gains if judge_gain(row) == "worse"]
    if worse:
        yield (
            f"{'; '.join(worse)}: D-PACE is behind the decay with this seed and these prompts. "
            "docs/results.md has six seeds."
        )
