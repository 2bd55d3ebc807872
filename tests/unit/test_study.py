"""The study's recipes and its report; the study itself takes hours and is run by hand."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from dpace.measure.results import Heldout, write_heldout
from dpace.metrics import Acceptance

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTHS = {25: 4, 100: 6, 400: 8}
"""Tokens a verification emits with each budget: a line over the logarithm of the steps."""


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("study")


@pytest.fixture
def output(study, tmp_path):
    """Two objectives that learn the same in a step, where a step of `spec-auf` takes twice as long."""
    plan = study.make_plan(tmp_path, None, 1.0)
    for name, seconds in {"dflash": 1.0, "dpace": 1.0, "spec-auf": 2.0}.items():
        for steps, length in LENGTHS.items():
            for seed in (0, 1):
                folder = plan.folder(study.Cell(name, 16, steps, seed))
                folder.mkdir(parents=True)
                rows = Acceptance(np.eye(16, dtype=int)[[length - 1] * 8], 16, np.zeros(8, int))
                write_heldout(folder, Heldout.of([f"{kind}/heldout/{i}" for kind in study.KINDS for i in (0, 1)], rows))
                log = {"log_history": [{"step": steps, "step_seconds": seconds * (1 + seed)}]}
                (folder / "trainer_state.json").write_text(json.dumps(log))
                facts = {"target": "a/b", "conversations": 9, "versions": {"torch": "2"}}
                facts["hardware"] = {"cores": 2, "device": "x"}
                (folder / "provenance.json").write_text(json.dumps(facts))
    return tmp_path


def test_each_candidate_is_a_recipe_of_its_own(study, tmp_path):
    plan = study.make_plan(tmp_path, None, 1.0)
    recipes = [plan.recipe_of(study.Cell(name, 16, 25, 0)) for name in study.CANDIDATES]
    assert all(recipes.count(recipe) == 1 for recipe in recipes)
    assert {later / former for former, later in zip(plan.budgets, plan.budgets[1:], strict=False)} == {4}


def test_gains_at_equal_seconds_are_those_of_half_the_steps(study, output):
    found = importlib.import_module("study_report").Study(output, list(study.CANDIDATES))
    for steps, length in LENGTHS.items():
        assert found.gain("spec-auf", "dpace", 16, steps) == (0, 0, 0)
        gain = found.gain_in_equal_seconds("spec-auf", "dpace", 16, steps)
        assert gain == pytest.approx([-1 / length] * 3)  # half the steps: one token less
    assert found.step_cost("spec-auf", "dpace", 16) == 2


def test_the_report_has_every_objective_and_both_figures(study, output):
    text = importlib.import_module("study_report").write_report(output, list(study.CANDIDATES)).read_text()
    assert "--stage final --objectives spec-auf" in text and text.count("| spec-auf |") == 6
    for name in ("tau", "gain"):
        assert f"](study-{name}.svg)" in text
        assert "spec-auf" in (output / "report" / f"study-{name}.svg").read_text()
