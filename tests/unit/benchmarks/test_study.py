"""The study's recipes and its report; the study itself takes hours and is run by hand."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import paper
import pytest
import study_report
import study_trials
import torch

import dpace.train.loop
from dpace.measure.results import write_heldout
from dpace.metrics import Acceptance
from dpace.target.head import Head
from tests.support.rows import make_response, make_row

ROOT = Path(__file__).parents[3]
LENGTHS = {25: 4, 100: 6, 400: 8}
"""Tokens a verification emits with each budget: a line over the logarithm of the steps."""


@pytest.fixture
def study():
    """Imported late: it turns the bars of others off."""
    import study

    return study


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
                write_heldout(folder, [f"{kind}/heldout/{i}" for kind in study.KINDS for i in (0, 1)], rows)
                log = {"log_history": [{"step": steps, "step_seconds": seconds * (1 + seed)}]}
                (folder / "trainer_state.json").write_text(json.dumps(log))
                facts = {"target": "a/b", "conversations": 9, "versions": {"torch": "2"}}
                facts["hardware"] = {"cores": 2, "device": "x"}
                (folder / "provenance.json").write_text(json.dumps(facts))
    return tmp_path


def test_each_candidate_is_a_recipe_of_its_own(study, tmp_path):
    plan = study.make_plan(tmp_path, None, 1.0)
    runs = [
        (plan.recipe_of(study.Cell(name, 16, 25, 0)), candidate.trial is nullcontext or name)
        for name, candidate in study.CANDIDATES.items()
    ]
    assert all(runs.count(run) == 1 for run in runs)
    assert {later / former for former, later in zip(plan.budgets, plan.budgets[1:], strict=False)} == {4}


def test_a_dry_run_counts_the_longer_steps_of_a_head(study, tmp_path, monkeypatch, capsys):
    minutes = []
    for name in ("dpace-0.3", "dpace-head"):
        cells = ["--stage", "final", "--steps", "6400", "--blocks", "16", "--seeds", "0", "--objectives", name]
        monkeypatch.setattr("sys.argv", ["study.py", "--output", str(tmp_path), "--dry-run", *cells])
        study.main()
        minutes.append(int(re.search(r"training (\d+)", capsys.readouterr().out)[1]))
    assert minutes[1] - minutes[0] == pytest.approx(0.4 * 6400 * 0.85 / 60, abs=2)


def test_the_pages_commands_name_what_there_is(study, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "results.md").read_text().replace("\\\n", " ")
    commands = [line.split()[2:] for line in page.splitlines() if line.startswith("python benchmarks/study.py --data")]
    commands = [args for args in commands if "costs" not in args]  # which has no --dry-run
    for args in commands:
        monkeypatch.setattr("sys.argv", ["study.py", *args, "--output", str(tmp_path), "--dry-run"])
        study.main()
    assert capsys.readouterr().out.count("drafters to train") == len(commands) >= 4


def test_gains_at_equal_seconds_are_over_twice_the_steps(study, output):
    found = study_report.Study(output, list(study.CANDIDATES))
    for steps, length in LENGTHS.items():
        assert found.gain("spec-auf", "dpace", 16, steps) == (0, 0, 0)
        gain = found.gain_in_equal_seconds("spec-auf", "dpace", 16, steps)
        assert gain == pytest.approx([-1 / (length + 1)] * 3)  # the other one has twice the steps: one token more
    assert found.step_cost("spec-auf", "dpace", 16) == 2
    (output / "costs.json").write_text(json.dumps({"16": {"dpace": [1.0, 1.0, 1.0], "spec-auf": [1.1, 1.2, 3.0]}}))
    timed = study_report.Study(output, list(study.CANDIDATES))
    assert timed.step_cost("spec-auf", "dpace", 16) == 1.2


def test_equal_seconds_take_the_budgets_that_the_seeds_share(study, output):
    """One seed with a long budget does not narrow the comparison of a short one to that seed."""
    long = output / "cells/dpace/block-16/steps-400/seed-0"
    shutil.copytree(long, output / "cells/dpace/block-16/steps-1600/seed-0")
    found = study_report.Study(output, list(study.CANDIDATES))
    gain = found.gain_in_equal_seconds("spec-auf", "dpace", 16, 400)
    assert gain == pytest.approx([-1 / 9] * 3)


def test_each_head_is_compared_with_the_drafter_without_it(study):
    with_head = {name for name, candidate in study.CANDIDATES.items() if "drafter.head" in candidate.changes}
    assert with_head == {name for name in study.CANDIDATES if study_report.headless(name)}
    for name, candidate in study.CANDIDATES.items():
        if (other := study_report.headless(name)) is not None:
            without = {n: v for n, v in candidate.changes.items() if ".head" not in n}
            assert study.CANDIDATES[other].changes == without
            assert study.CANDIDATES[other].objective == candidate.objective


def test_products_in_bf16_are_those_of_training_only(study, tmp_path):
    plans = [study.make_plan(tmp_path, None, 1.0, products) for products in ("fp32", "bf16")]
    assert [plan.recipe.train.products for plan in plans] == ["float32", "bfloat16"]
    (tmp_path / "study.json").write_text('{"scale": 1.0}')
    study.refuse_other_study(plans[0])
    with pytest.raises(SystemExit, match="holds a study with --products fp32, not bf16; name another --output"):
        study.refuse_other_study(plans[1])


def test_the_kind_that_is_kept_apart_counts_in_no_other_number(study, output):
    before = study_report.Study(output, list(study.CANDIDATES)).tau("dpace", 16, 100)
    for folder in study_report.find_cells(output).values():
        names = [f"{kind}/heldout/{i}" for kind in (*study.KINDS, study.APART) for i in (0, 1)]
        kept = study_report.read_heldout(folder)
        old = kept.acceptance(kept.ids)
        more = np.eye(16, dtype=int)[[15] * 2]
        write_heldout(folder, names, Acceptance(np.concatenate([old.rows, more]), 16, np.zeros(10, int)))
    found = study_report.Study(output, list(study.CANDIDATES))
    assert found.tau("dpace", 16, 100) == before and len(found.ids) == 8
    assert study.APART in study_report.kinds(found, 16).splitlines()[0]
    assert found.gain("dpace", "dflash", 16, 100, f"{study.APART}/").value == 0


def test_the_reports_commands_name_every_drafter_that_it_has(study, output, monkeypatch):
    shutil.copytree(output / "cells/dpace/block-16/steps-100/seed-0", output / "cells/dpace/block-8/steps-1600/seed-2")
    (output / "study.json").write_text('{"scale": 1.0, "products": "bf16"}')
    text = study_report.commands(study_report.Study(output, list(study.CANDIDATES)))
    planned = []
    monkeypatch.setattr(study, "estimate", lambda plan, cells: planned.extend(cells))
    for line in text.splitlines()[1:-2]:
        monkeypatch.setattr("sys.argv", [*line.split()[1:], "--output", str(output), "--dry-run"])
        study.main()
    extra = {study.Cell("dflash", 8, 1600, 2)}  # which is trained wherever D-PACE is
    assert sorted(planned) == sorted([*study_report.find_cells(output), *extra])


def test_the_report_has_every_objective_and_both_figures(study, output):
    text = study_report.write_report(output, list(study.CANDIDATES)).read_text()
    assert text.count("| spec-auf |") == 10
    for name in ("tau", "gain"):
        assert f"](study-{name}.svg)" in text
        assert "spec-auf" in (output / "report" / f"study-{name}.svg").read_text()


def test_soft_labels_at_a_temperature():
    """The gradient is that of the cross-entropy between the softened distributions, times the temperature."""
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(1, 1, 2, 4, generator=generator) for _ in range(2))
    head = Head(torch.randn(6, 4, generator=generator))
    hidden.requires_grad_()
    labels, is_scored = torch.zeros(1, 1, 2, dtype=torch.long), torch.ones(1, 1, 2, dtype=torch.bool)
    with study_trials.distillation_temperature(2.0):
        out = dpace.train.loop.frozen_head_nll(hidden, head, labels, is_scored, token_loss="kl", target_hidden=theirs)
    out.losses.sum().backward()
    p, q = ((states @ head.weight.T / 2).softmax(-1) for states in (theirs, hidden.detach()))
    torch.testing.assert_close(hidden.grad, 2 * (q - p) @ head.weight)


def test_the_papers_matrix_draws_prompts_with_their_turns():
    row = make_row(responses=[make_response(id=str(i // 2), turn=i % 2) for i in range(8)])
    for pick in paper.resample_prompts(row, np.random.default_rng(0)):
        assert len(pick) == 8 and (pick[::2] + 1 == pick[1::2]).all() and (pick[::2] % 2 == 0).all()
