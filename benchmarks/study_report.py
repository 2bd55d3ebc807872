"""Tables of what `benchmarks/study.py` has trained so far; and the tables of the pages, from the records.

    python benchmarks/study_report.py FOLDER

unpacks records into FOLDER, which is empty, and prints the tables of `docs/results.md` and `benchmarks/tried.md` that
follow from them: those of `benchmarks/records/tables.yaml`, as the pages have them.
"""

import statistics
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from dpace.measure.results import HELDOUT_FILE, Estimate, nullable, read_heldout, read_log
from dpace.metrics import Acceptance, tau_estimate, tau_gain
from dpace.report.sections import percent
from dpace.report.tables import Section, to_markdown
from dpace.system.ledger import write_text

BASELINE = "dflash"
OURS = "dpace"
ALWAYS = (BASELINE, OURS)
APART = "apart"
"""A kind of text that is reported alone, so that no choice looks at it."""
UNKNOWN: Estimate = (None, None, None)
Pairs = Sequence[tuple[str, str]]
"""An objective, and the one that it is compared with."""
RECORDS = Path(__file__).parent / "records"


class Cell(NamedTuple):
    """What one drafter of the study was trained with."""

    objective: str
    block: int
    steps: int
    seed: int


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

    def __init__(self, output: Path):
        self.folders = find_cells(output)
        self.measured = {cell: read_heldout(folder) for cell, folder in self.folders.items()}
        self.ids = next(iter(self.measured.values())).ids
        others = [str(self.folders[cell]) for cell, found in self.measured.items() if found.ids != self.ids]
        if others:
            sys.exit(f"other prompts than the rest were measured in {', '.join(others)}; remove their {HELDOUT_FILE}")
        self.budgets = sorted({cell.steps for cell in self.folders})

    def seeds(self, block: int, *runs: tuple[str, int]) -> list[int]:
        """Return the seeds that all of these objectives have with these budgets."""
        of_runs = [{c.seed for c in self.folders if c[:3] == (name, block, steps)} for name, steps in runs]
        return sorted(set.intersection(*of_runs))

    def acceptances(self, name: str, block: int, steps: int, seeds: Sequence[int], kind: str = "") -> list[Acceptance]:
        """Return an acceptance for each seed, with a row for each prompt of a kind; without one, of all but `APART`."""
        kinds = [name.partition("/")[0] for name in self.ids]
        ids = [name for name, of in zip(self.ids, kinds, strict=True) if (of == kind if kind else of != APART)]
        found = [self.measured[Cell(name, block, steps, seed)].acceptance(ids) for seed in seeds]
        return [acceptance for acceptance in found if acceptance is not None]

    def tau(self, name: str, block: int, steps: int) -> float:
        """Return tau, all kinds and seeds pooled."""
        return tau_estimate([self.acceptances(name, block, steps, self.seeds(block, (name, steps)))])[0]

    def gain(self, name: str, over: str, block: int, steps: int, kind: str = "") -> Estimate:
        """Return the gain of tau at equal steps, as a ratio minus 1, of the seeds that both have."""
        seeds = self.seeds(block, (name, steps), (over, steps))
        if not seeds or name == over:
            return UNKNOWN
        sides = [self.acceptances(side, block, steps, seeds, kind) for side in (name, over)]
        return nullable(tau_gain(*sides))

    def gains_by_seed(self, name: str, over: str, block: int, steps: int) -> str:
        """Write the gain at equal steps of each seed that both have, in percent."""
        seeds = self.seeds(block, (name, steps), (over, steps))
        pairs = zip(*(self.acceptances(side, block, steps, seeds) for side in (name, over)), strict=True)
        return " ".join(f"{100 * (ours.tau / theirs.tau - 1):+.1f}" for ours, theirs in pairs)

    def gain_in_equal_seconds(self, name: str, over: str, block: int, steps: int) -> Estimate:
        """Return the gain of tau over the other one, had that trained for as long as this one's steps took.

        The other one's tau between two budgets is a line over the logarithm of the seconds; past the first and the last
        budget, the nearest line is drawn on. Its budgets are those that it has with all seeds of the comparison.
        """
        seeds = self.seeds(block, (name, steps), (over, steps))
        budgets = [budget for budget in self.budgets if {*seeds} <= {*self.seeds(block, (over, budget))}]
        if not seeds or len(budgets) < 2 or name == over:
            return UNKNOWN
        known = np.log(budgets)
        wanted = np.log(steps * self.step_cost(name, over, block))  # in steps of the other one
        place = int(np.clip(np.searchsorted(known, wanted), 1, len(known) - 1))
        share = (wanted - known[place - 1]) / (known[place] - known[place - 1])
        sides = [self.acceptances(over, block, budget, seeds) for budget in budgets]

        def gain(taus: Any) -> Any:
            return taus[-1] / (taus[place - 1] + share * (taus[place] - taus[place - 1])) - 1

        return nullable(tau_estimate([*sides, self.acceptances(name, block, steps, seeds)], gain))

    def step_cost(self, name: str, over: str, block: int) -> float:
        """Return the time of a step over that of the other one: the median of the pairs with one budget and seed.

        They are trained one soon after the other, so that what else the machine did counts little.
        """
        pairs = [(cell, cell._replace(objective=over)) for cell in self.folders if cell[:2] == (name, block)]
        known = [[step_seconds(self.folders[cell]) for cell in pair] for pair in pairs if pair[1] in self.folders]
        return statistics.median(ours / theirs for ours, theirs in known)


def compare(study: Study, pairs: Pairs, block: int, steps: int, by: str) -> list[dict[str, str]]:
    """Make a row for each pair that was trained: the gain of the first over the second, in percent.

    Args:
        study: of the drafters.
        pairs: of objectives.
        block: size of the blocks.
        steps: the budget of both.
        by: `kind` adds the gain on each kind of text, and `time` that in equal training time.
    """
    rows = []
    for name, over in pairs:
        gain = study.gain(name, over, block, steps)
        if gain == UNKNOWN:
            continue
        row = {"objective": name, "over": over, "tau": f"{study.tau(name, block, steps):.2f}", "all": in_percent(gain)}
        if by == "time":
            row["by seed"] = study.gains_by_seed(name, over, block, steps)
            row["time of a step"] = f"{study.step_cost(name, over, block):.2f}"
            row["all, in equal time"] = in_percent(study.gain_in_equal_seconds(name, over, block, steps))
        for kind in dict.fromkeys(name.partition("/")[0] for name in study.ids):
            if by == "kind" or kind == APART:
                row[kind] = in_percent(study.gain(name, over, block, steps, kind))
        rows.append(row)
    return rows


def in_percent(gain: Estimate) -> str:
    """Write a gain in a table that has the unit."""
    return percent(gain).replace(" %", "")


def sections(study: Study, names: Sequence[str]) -> Iterator[Section]:
    """Make two tables for each block size and budget; some have no rows."""
    pairs = [(name, over) for name in names for over in ALWAYS if name != BASELINE]
    for block in sorted({cell.block for cell in study.folders}):
        for steps in study.budgets:
            for by in ("kind", "time"):
                title = f"Blocks of {block}, {steps} steps, by {by}"
                yield Section(title, "Gains of tau in %.", compare(study, pairs, block, steps, by))


def write_report(output: Path, order: Sequence[str]) -> Path:
    """Write `study.md` into the study's folder, and give its path.

    Args:
        output: of the study.
        order: names of all objectives, without options.
    """
    study = Study(output)
    # An objective with changed options stands behind the one without.
    places = {name: place for place, name in enumerate(order)}
    found = {cell.objective for cell in study.folders}
    names = sorted(found, key=lambda name: (places.get(name.split(":")[0], len(order)), name))
    page = output / "study.md"
    write_text(page, "\n\n".join(to_markdown(section) for section in sections(study, names) if section.rows) + "\n")
    return page


def unpack(records: Sequence[str], folder: Path) -> Study:
    """Unpack records into one study; objectives of the second one on have its name behind theirs."""
    (folder / "cells").mkdir(parents=True)
    for record in records:
        with tarfile.open(RECORDS / f"study-{record}.tar.gz") as file:
            file.extractall(folder / record, filter="data")
        added = "" if record == records[0] else f", {record}"
        for path in list(folder.glob(f"{record}/cells/*")):
            path.rename(folder / "cells" / (path.name + added))
    return Study(folder)


def page_tables(folder: Path) -> Iterator[str]:
    """Write the tables that `tables.yaml` names, in Markdown; their records are unpacked into an empty folder."""
    for number, table in enumerate(yaml.safe_load((RECORDS / "tables.yaml").read_text())):
        study = unpack(table.pop("records"), folder / str(number))
        yield to_markdown(Section("", rows=compare(study, **table))).rpartition("\n\n")[2]


if __name__ == "__main__":
    print(*page_tables(Path(sys.argv[1])), sep="\n\n")
