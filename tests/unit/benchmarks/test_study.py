"""The study's recipes and its report; the study itself takes hours and is run by hand."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import paper
import picture
import pytest
import study
import study_report

from dpace.measure.results import write_heldout
from dpace.metrics import Acceptance
from tests.support.rows import make_response, make_row
from tests.support.scripts import run_script

ROOT = Path(__file__).parents[3]
PAGES = "".join((ROOT / name).read_text() for name in ("docs/results.md", "benchmarks/tried.md"))
LENGTHS = {25: 4, 100: 6, 400: 8}
"""Tokens a verification emits with each budget: a line over the logarithm of the steps."""


@pytest.fixture
def output(tmp_path):
    """Two objectives that learn the same in a step, where a step of `spec-auf` takes twice as long."""
    plan = study.Plan(study.Options(output=tmp_path))
    for name, seconds in {"dflash": 1.0, "dpace": 1.0, "spec-auf": 2.0}.items():
        for steps, length in LENGTHS.items():
            for seed in (0, 1):
                folder = plan.folder(study.Cell(name, 16, steps, seed))
                folder.mkdir(parents=True)
                rows = Acceptance(np.eye(16, dtype=int)[[length - 1] * 8 + [15] * 2], 16, np.zeros(10, int))
                names = [f"{kind}/heldout/{i}" for kind in (*study.KINDS, study.APART) for i in (0, 1)]
                write_heldout(folder, names, rows, "hash")
                log = {"log_history": [{"step": steps, "step_seconds": seconds * (1 + seed)}]}
                (folder / "trainer_state.json").write_text(json.dumps(log))
    return tmp_path


def test_each_candidate_is_a_recipe_of_its_own(tmp_path):
    plan = study.Plan(study.Options(output=tmp_path))
    runs = [plan.recipe_of(study.Cell(name, 16, 25, 0)) for name in study.CANDIDATES]
    assert all(runs.count(run) == 1 for run in runs)


def test_an_objective_may_change_options(tmp_path):
    plan = study.Plan(study.Options(output=tmp_path))
    before = plan.recipe_of(study.Cell("growing-blocks", 16, 25, 0))
    name = "growing-blocks:drafter.num_layers=3:drafter.target_layer_ids=[14, 21, 27]:train.learning_rate=6.0e-3"
    changed = plan.recipe_of(study.Cell(name, 16, 25, 0))
    assert (changed.drafter.num_layers, changed.drafter.target_layer_ids) == (3, (14, 21, 27))
    assert changed.train == replace(before.train, learning_rate=6e-3) and changed.loss == before.loss
    for wrong in ("respond.seed=1", "drafter.layers=1", "layers"):
        with pytest.raises(SystemExit, match=f"{wrong} is no option of drafter, loss or train"):
            plan.recipe_of(study.Cell(f"dpace:{wrong}", 16, 25, 0))


def test_the_pages_commands_name_what_there_is(tmp_path, capsys):
    lines = PAGES.replace("\\\n", " ").splitlines()
    commands = [line.split()[2:] for line in lines if line.startswith("python benchmarks/study.py --data")]
    for args in commands:
        run_script("study.py", *args, "--output", tmp_path, "--dry-run")
    assert capsys.readouterr().out.count("drafters to train") == len(commands) >= 5


def test_gains_at_equal_seconds_are_over_twice_the_steps(output):
    found = study_report.Study(output)
    for steps, length in LENGTHS.items():
        assert found.gain("spec-auf", "dpace", 16, steps) == (0, 0, 0)
        gain = found.gain_in_equal_seconds("spec-auf", "dpace", 16, steps)
        assert gain == pytest.approx([-1 / (length + 1)] * 3)  # the other one has twice the steps: one token more
    assert found.step_cost("spec-auf", "dpace", 16) == 2


def test_equal_seconds_take_the_budgets_that_the_seeds_share(output):
    """One seed with a long budget does not narrow the comparison of a short one to that seed."""
    long = output / "cells/dpace/block-16/steps-400/seed-0"
    shutil.copytree(long, output / "cells/dpace/block-16/steps-1600/seed-0")
    found = study_report.Study(output)
    gain = found.gain_in_equal_seconds("spec-auf", "dpace", 16, 400)
    assert gain == pytest.approx([-1 / 9] * 3)


def test_a_study_in_other_products_is_refused(tmp_path):
    plan = study.Plan(study.Options(output=tmp_path, products="bfloat16"))
    assert plan.recipe.train.products == "bfloat16"
    (tmp_path / "study.json").write_text('{"scale": 1.0, "products": "float32"}')
    with pytest.raises(SystemExit, match="holds a study with --products float32, not bfloat16; name another --output"):
        study.refuse_other_study(plan)


def test_the_kind_that_is_kept_apart_counts_in_no_other_number(output):
    found = study_report.Study(output)
    assert len(found.ids) == 10 and found.tau("dpace", 16, 100) == LENGTHS[100]
    assert study_report.compare(found, [("dpace", "dflash")], 16, 100, "kind")[0][study.APART] == "+0.0"


def test_the_report_has_every_objective(output):
    text = study_report.write_report(output, list(study.CANDIDATES)).read_text()
    assert text.count("| spec-auf |") == 3 * 2 * 2


def test_the_pages_have_the_tables_of_the_records(tmp_path):
    tables = list(study_report.page_tables(tmp_path))
    assert [table for table in tables if table not in PAGES] == []
    shown = re.findall(r"\+[\d.]+ \[.+?\]", (ROOT / "README.md").read_text())
    assert len(shown) >= 5 and not [gain for gain in shown if gain not in PAGES.replace("*", "")]


def test_the_picture_has_the_numbers_of_the_model_card():
    drawn, words = picture.draw()
    assert drawn == picture.PICTURE.read_text()
    assert f"![{words}](docs/{picture.PICTURE.name})" in " ".join((ROOT / "README.md").read_text().split())


def test_the_papers_matrix_draws_prompts_with_their_turns():
    """Turns differ, and prompts do not."""
    turns = [make_response(id=str(i // 2), turn=i % 2, accepted_lengths=[2 * (i % 2)]) for i in range(8)]
    assert paper.mean_over_sets([make_row(responses=turns)], paper.tau_of) == (2.0, 2.0, 2.0)
