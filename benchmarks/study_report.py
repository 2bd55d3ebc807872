"""Tables and figures of what `benchmarks/study.py` has trained so far, as Markdown and two SVG files."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpace.measure.results import HELDOUT_FILE, read_heldout, read_log
from dpace.metrics import Acceptance, tau_estimate
from dpace.report.plots import draw_panels
from dpace.system.ledger import write_text

BASELINE, OURS = ALWAYS = "dflash", "dpace"
GROWING = "growing-blocks"
APART = "apart"
"""A kind of text that is reported alone, so that no choice looks at it."""
FILES = ("study.md", "study-tau.svg", "study-gain.svg")
SCRIPT = "python benchmarks/study.py"


class Cell(NamedTuple):
    """What one drafter of the study was trained with."""

    objective: str
    block: int
    steps: int
    seed: int


class Value(NamedTuple):
    """A number and its 95 % interval over prompts and seeds, nan where there are too few prompts for one."""

    value: float
    low: float
    high: float


def find_cells(output: Path) -> dict[Cell, Path]:
    """Find the finished drafters."""
    found = {}
    for path in sorted(output.glob("cells/*/block-*/steps-*/seed-*")):
        numbers = [int(part.rpartition("-")[2]) for part in path.parts[-3:]]
        if (path / HELDOUT_FILE).exists():
            found[Cell(path.parts[-4], *numbers)] = path
    return found


def step_seconds(folder: Path) -> float:
    """Return the median seconds of a drafter's training steps."""
    return statistics.median(entry["step_seconds"] for entry in read_log(folder) if "step_seconds" in entry)


class Study:
    """The finished drafters, and what follows from them."""

    def __init__(self, output: Path, order: Sequence[str]):
        self.folders = find_cells(output)
        settings = output / "study.json"
        self.settings: dict[str, Any] = json.loads(settings.read_text()) if settings.exists() else {}
        costs = output / "costs.json"
        self.costs: dict[str, dict[str, list[float]]] = json.loads(costs.read_text()) if costs.exists() else {}
        self.measured = {cell: read_heldout(folder) for cell, folder in self.folders.items()}
        self.blocks = sorted({cell.block for cell in self.folders})
        self.budgets = sorted({cell.steps for cell in self.folders})
        names = {cell.objective for cell in self.folders}
        self.objectives = [name for name in order if name in names]
        ids = next(iter(self.measured.values())).ids if self.measured else []
        self.every_id = ids
        self.ids = [name for name in ids if not name.startswith(f"{APART}/")]
        self.kinds = list(dict.fromkeys(name.partition("/")[0] for name in ids))

    def seeds(self, block: int, *runs: tuple[str, int]) -> list[int]:
        """Return the seeds that all of these objectives have with these budgets."""
        of_runs = [{c.seed for c in self.folders if c[:3] == (name, block, steps)} for name, steps in runs]
        return sorted(set.intersection(*of_runs))

    def with_budget(self, block: int, steps: int) -> list[str]:
        """Name the objectives that were trained with a budget."""
        return [name for name in self.objectives if self.seeds(block, (name, steps))]

    def acceptances(self, name: str, block: int, steps: int, seeds: Sequence[int], kind: str = "") -> list[Acceptance]:
        """Return an acceptance for each seed, with a row for each prompt of a kind; without one, of all but `APART`."""
        ids = [name for name in (self.every_id if kind else self.ids) if name.startswith(kind)]
        found = [self.measured[Cell(name, block, steps, seed)].acceptance(ids) for seed in seeds]
        return [acceptance for acceptance in found if acceptance is not None]

    def tau(self, name: str, block: int, steps: int) -> Value | None:
        """Return tau, all kinds and seeds pooled."""
        seeds = self.seeds(block, (name, steps))
        if not seeds:
            return None
        return Value(*tau_estimate([self.acceptances(name, block, steps, seeds)]))

    def gain(self, name: str, over: str, block: int, steps: int, kind: str = "") -> Value | None:
        """Return the gain of tau at equal steps, as a ratio minus 1, of the seeds that both have."""
        seeds = self.seeds(block, (name, steps), (over, steps))
        if not seeds or name == over:
            return None
        sides = [self.acceptances(side, block, steps, seeds, kind) for side in (name, over)]
        return Value(*tau_estimate(sides, lambda taus: taus[0] / taus[1] - 1))

    def gains_by_seed(self, name: str, over: str, block: int, steps: int) -> list[float]:
        """Return the gain at equal steps of each seed that both have."""
        seeds = self.seeds(block, (name, steps), (over, steps))
        pairs = zip(*(self.acceptances(side, block, steps, seeds) for side in (name, over)), strict=True)
        return [ours.tau / theirs.tau - 1 for ours, theirs in pairs]

    def gain_in_equal_seconds(self, name: str, over: str, block: int, steps: int) -> Value | None:
        """Return the gain of tau over the other one, had that trained for as long as this one's steps took.

        The other one's tau between two budgets is a line over the logarithm of the seconds; past the first and the last
        budget, the nearest line is drawn on. Its budgets are those that it has with all seeds of the comparison.
        """
        seeds = self.seeds(block, (name, steps), (over, steps))
        budgets = [budget for budget in self.budgets if {*seeds} <= {*self.seeds(block, (over, budget))}]
        if not seeds or len(budgets) < 2 or name == over:
            return None
        cost = self.step_cost(name, over, block)
        assert cost is not None  # they share seeds
        known, wanted = np.log(budgets), np.log(steps * cost)  # in steps of the other one
        place = int(np.clip(np.searchsorted(known, wanted), 1, len(known) - 1))
        share = (wanted - known[place - 1]) / (known[place] - known[place - 1])
        sides = [self.acceptances(over, block, budget, seeds) for budget in budgets]

        def gain(taus):
            return taus[-1] / (taus[place - 1] + share * (taus[place] - taus[place - 1])) - 1

        return Value(*tau_estimate([*sides, self.acceptances(name, block, steps, seeds)], gain))

    def step_cost(self, name: str, over: str, block: int) -> float | None:
        """Return the time of a step over that of the other one.

        It is that of the stage `costs`. Where that has not run, it is the median of the pairs with one budget and seed:
        they are trained one soon after the other, so that what else the machine did counts little.
        """
        costs = self.costs.get(str(block), {})
        if name in costs and over in costs:
            return statistics.median(ours / theirs for ours, theirs in zip(costs[name], costs[over], strict=True))
        pairs = [(cell, Cell(over, *cell[1:])) for cell in self.folders if cell[:2] == (name, block)]
        known = [[step_seconds(self.folders[cell]) for cell in pair] for pair in pairs if pair[1] in self.folders]
        return statistics.median(ours / theirs for ours, theirs in known) if known else None


def percent(value: Value | None) -> str:
    """Write a gain in percent with its interval."""
    return "-" if value is None else written(Value(*(100 * number for number in value)), "+.1f")


def written(value: Value, how: str) -> str:
    """Write a number, and its interval where it has one."""
    number, *ends = (format(x, how) for x in value)
    return number if "nan" in ends else f"{number} [{', '.join(ends)}]"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def screening(study: Study, steps: int) -> str:
    """Write the gains of all objectives with one budget, the best over D-PACE first."""
    rows = []
    for name in study.objectives:
        gains = [study.gain(name, OURS, block, steps) for block in study.blocks]
        if name != OURS and not any(gains):
            continue
        values = (study.gain, study.gain, study.gain_in_equal_seconds)
        of_block = list(zip((BASELINE, OURS, OURS), values, strict=True))
        cells = [percent(value(name, over, block, steps)) for block in study.blocks for over, value in of_block]
        costs = [cost for cost in (study.step_cost(name, OURS, block) for block in study.blocks) if cost]
        cost = f"{statistics.mean(costs):.2f}" if costs else "-"
        best = max((gain.value for gain in gains if gain), default=0.0)
        rows.append((best, [name, cost, *cells]))
    kinds_of_gain = [*(f"over {over}, %" for over in (BASELINE, OURS)), f"over {OURS}, equal seconds, %"]
    columns = [f"blocks of {b}: {words}" for b in study.blocks for words in kinds_of_gain]
    rows.sort(key=lambda row: -row[0])
    return table(["objective", f"step's time over {OURS}", *columns], [row for _, row in rows])


def budgets(study: Study, block: int) -> str:
    """Write a row for each budget and each objective that was trained with it."""
    rows = []
    for steps in study.budgets:
        for name in study.with_budget(block, steps):
            tau, by_seed = study.tau(name, block, steps), study.gains_by_seed(name, BASELINE, block, steps)
            rows.append(
                [
                    str(steps),
                    name,
                    "-" if tau is None else written(tau, ".2f"),
                    percent(study.gain(name, BASELINE, block, steps)),
                    "-" if name == BASELINE else " ".join(f"{100 * gain:+.1f}" for gain in by_seed),
                    percent(study.gain_in_equal_seconds(name, BASELINE, block, steps)),
                    percent(study.gain(name, OURS, block, steps)),
                    percent(study.gain_in_equal_seconds(name, OURS, block, steps)),
                ]
            )
    over = [f"over {BASELINE}, equal steps, %", "by seed", "equal seconds, %", f"over {OURS}, equal steps, %"]
    return table(["steps", "objective", "tau", *over, "equal seconds, %"], rows)


def headless(name: str) -> str | None:
    """Name the same drafter without its head; None where it has none."""
    body, head, _ = name.partition("-head")
    return (GROWING if f"{body}-blocks" == GROWING else body) if head else None


def kinds(study: Study, block: int) -> str:
    """Write the gains over both and over the same drafter without a head, by kind of text, with every budget."""
    rows = []
    for steps in study.budgets:
        names = study.with_budget(block, steps)
        for name in names:
            for over in dict.fromkeys([BASELINE, OURS, headless(name)]):
                if over in names and over != name and name != BASELINE:
                    gains = [study.gain(name, over, block, steps, kind and f"{kind}/") for kind in ("", *study.kinds)]
                    rows.append([str(steps), name, f"over {over}", *map(percent, gains)])
    return table(["steps", "objective", "gain, %", "all", *study.kinds], rows)


def draw(study: Study, value: Callable[[str, int, int], Value | None], ylabel: str) -> str:
    """Draw a quantity against the budget, a panel for each block size and a line for each objective; as SVG.

    A point with fewer seeds than the baseline has there is left out: its interval would tell of little else.
    """

    def panel(axis, block: int) -> None:
        names = study.objectives
        every = {name: [(steps, value(name, block, steps)) for steps in study.budgets] for name in names}
        needed = {steps: len(study.seeds(block, (BASELINE, steps))) for steps in study.budgets}
        known = {
            name: [(s, v) for s, v in points if v and len(study.seeds(block, (name, s))) >= needed[s]]
            for name, points in every.items()
        }
        curves = [name for name in names if len(known[name]) > 1]
        names = curves or [name for name in names if known[name]]
        for place, name in enumerate(names):
            points = known[name]
            shift = 1.05 ** (place - (len(names) - 1) / 2)  # so that intervals do not cover each other
            where = [steps * shift for steps, _ in points]
            middle = np.array([found for _, found in points])
            ends = np.abs(middle[:, 1:] - middle[:, :1]).T
            color = f"C{study.objectives.index(name)}"
            axis.errorbar(where, middle[:, 0], yerr=ends, color=color, lw=1.4, label=name)
        axis.set_xscale("log")
        axis.set_xticks(study.budgets, [str(steps) for steps in study.budgets])
        axis.minorticks_off()
        axis.set(xlabel="optimizer steps", ylabel=ylabel)
        if ylabel.startswith("gain"):
            axis.axhline(0, color="gray", lw=1, marker="")

    return draw_panels({f"blocks of {block}": block for block in study.blocks}, panel)


def commands(study: Study) -> str:
    """Write the commands that made the study: one for all objectives that have the same seeds with a budget."""
    same: dict[tuple, list[str]] = defaultdict(list)
    for name, block, steps in dict.fromkeys(cell[:3] for cell in study.folders):
        same[block, steps, *study.seeds(block, (name, steps))].append(name)
    settings = "".join(f" --{name} {value}" for name, value in study.settings.items())
    lines = []
    for (block, steps, *seeds), names in sorted(same.items()):
        numbers = f"--blocks {block} --steps {steps} --seeds {' '.join(map(str, seeds))}"
        more = [name for name in study.objectives if name in names and name not in ALWAYS]
        objectives = " ".join(["", "--objectives", *more]) if more else ""
        lines.append(f"{SCRIPT} --data FOLDER --stage final{settings} {numbers}{objectives}")
    return "\n".join(["```", *lines, f"{SCRIPT} --stage report", "```\n"])


def about(study: Study) -> str:
    """Say what was trained where."""
    cell, folder = next(iter(study.folders.items()))
    facts = json.loads((folder / "provenance.json").read_text())
    machine = f"{facts['hardware']['cores']} cores of {facts['hardware']['device']}"
    seeds = ", ".join(map(str, sorted({cell.seed for cell in study.folders})))
    target = re.split(r"[/\\]", facts["target"])[-1]
    return (
        f"{target}, torch {facts['versions']['torch']}, temperature 0, {machine}. {facts['conversations']} answers to "
        f"train on and {len(study.ids)} to measure on, of {len(study.kinds)} kinds. {len(study.folders)} drafters, "
        f"seeds {seeds}. Intervals are of 95 %, by a bootstrap of prompts, the same for both sides, and Student's t "
        "of the seeds. For equal seconds, tau is put on a line over "
        "the logarithm of the seconds of training steps.\n"
    )


def write_report(output: Path, order: Sequence[str]) -> Path:
    """Write `report/study.md` and its figures, and give the path of the first.

    Args:
        output: of the study.
        order: names of all objectives.
    """
    study, folder = Study(output, order), output / "report"
    if not study.folders:
        raise SystemExit(f"{output} has no finished drafter; run --stage screen first")
    folder.mkdir(exist_ok=True)
    middle = study.budgets[len(study.budgets) // 2]
    parts = [commands(study), about(study)]
    parts += [f"All objectives that were trained with {middle} steps, of common seeds:\n", screening(study, middle)]
    for block in study.blocks:
        parts += [f"Blocks of {block}, every budget:\n", budgets(study, block)]
        parts += [f"Blocks of {block}, by kind:\n", kinds(study, block)]
    figures = {
        FILES[1]: draw(study, study.tau, "tau"),
        FILES[2]: draw(
            study, lambda name, block, steps: _hundredfold(study.gain(name, OURS, block, steps)), GAIN_LABEL
        ),
    }
    parts += [f"![Tau against the budget]({FILES[1]})\n\n![Gain over D-PACE against the budget]({FILES[2]})\n"]
    for name, text in figures.items():
        write_text(folder / name, text)
    write_text(folder / FILES[0], "\n".join(parts))
    return folder / FILES[0]


GAIN_LABEL = "gain of tau over dpace, %"


def _hundredfold(value: Value | None) -> Value | None:
    return None if value is None else Value(*(100 * number for number in value))
