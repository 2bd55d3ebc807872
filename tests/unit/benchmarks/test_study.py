"""The study's recipes and its report; the study itself takes hours and is run by hand."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import paper
import pytest
import study
import study_report

from dpace.measure.results import read_log, write_heldout
from dpace.metrics import Acceptance, tau_estimate, tau_gain
from dpace.report.sections import percent
from tests.support.rows import make_response, make_row
from tests.support.scripts import run_script

ROOT = Path(__file__).parents[3]
RECORDED = {
    "dflash": "the decay",
    "bv": "BV",
    "dpace": "D-PACE",
    "dflash-growing-blocks": "the decay, growing",
    "bv-growing-blocks": "BV, growing",
    "growing-blocks": "D-PACE, growing",
}
"""Objectives of the kept records, as the page names them."""
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
    page = (ROOT / "docs" / "results.md").read_text().replace("\\\n", " ")
    commands = [line.split()[2:] for line in page.splitlines() if line.startswith("python benchmarks/study.py --data")]
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
    (tmp_path / "study.json").write_text(json.dumps(plan.settings | {"more-prompts": "x.jsonl"}))
    with pytest.raises(SystemExit, match="holds a study with --more-prompts x.jsonl, not None; name another"):
        study.refuse_other_study(plan)


def test_the_kind_that_is_kept_apart_counts_in_no_other_number(output):
    found = study_report.Study(output)
    assert len(found.ids) == 10 and found.tau("dpace", 16, 100)[0] == LENGTHS[100]
    assert study.APART in study_report.kinds(found, ["dpace"], 16).rows[0]
    assert found.gain("dpace", "dflash", 16, 100, study.APART)[0] == 0


def test_the_report_has_every_objective_and_the_figure(output):
    text = study_report.write_report(output, list(study.CANDIDATES)).read_text()
    assert text.count("| spec-auf |") == 3 + 3 * 2
    assert "](study-tau.svg)" in text and "spec-auf" in (output / "study-tau.svg").read_text()


def unpack_records(name, folder):
    """Unpack a record of the repository, and read it with the page that has its numbers."""
    with tarfile.open(ROOT / "benchmarks" / "records" / name) as records:
        records.extractall(folder, filter="data")
    page = (ROOT / "docs" / "results.md").read_text()
    return study_report.Study(folder), " ".join(page.split())


def test_what_the_page_says_of_blocks_of_8_follows_from_the_records(tmp_path):
    kept, page = unpack_records("study-blocks-8.tar.gz", tmp_path)
    shown = []
    for name, over in (("bv", "dpace"), ("bv-growing-blocks", "growing-blocks")):
        gain, low, high = kept.gain(name, over, 8, 100)
        shown.append(f"{-100 * gain:.1f} % [{-100 * high:.1f}, {-100 * low:.1f}] less")
    assert f"after 100 steps, it gives {shown[0]}, and with growing blocks {shown[1]}" in page


def test_the_pages_numbers_follow_from_the_records(tmp_path):
    """The table of growing blocks and of BV's loss in docs/results.md, cell by cell."""
    kept, page = unpack_records("study-blocks-16.tar.gz", tmp_path)
    for name, shown in RECORDED.items():
        cells = [shown]
        for steps in (100, 400):
            cells.append(f"{kept.tau(name, 16, steps)[0]:.2f}")
            cells += [percent(kept.gain(name, over, 16, steps)).replace(" %", "") for over in ("dflash", "dpace")]
        assert f"| {' | '.join(cells)} |".replace("| - |", "| |") in page


def test_the_page_says_what_6005_prompts_gave(tmp_path):
    """Where no answer is read more than three times."""
    kept, page = unpack_records("study-6005-prompts.tar.gz", tmp_path)
    kinds = ("", *study.KINDS, study.APART)
    comparisons = {
        "D-PACE over the decay": ("dpace", "dflash"),
        "growing over the decay": ("growing-blocks", "dflash"),
        "growing over D-PACE": ("growing-blocks", "dpace"),
    }
    for shown, (name, over) in comparisons.items():
        gains = [percent(kept.gain(name, over, 16, 1500, kind)).replace(" %", "") for kind in kinds]
        assert f"| {shown} | {' | '.join(gains)} |" in page
    rows = {
        "dflash": ("tau, the decay", "the decay"),
        "dpace": ("tau, D-PACE", "D-PACE"),
        "growing-blocks": ("tau, D-PACE with growing blocks", "growing"),
    }
    reach_rates = []
    for name, (row, short) in rows.items():
        taus = [kept.acceptances(name, 16, 1500, [0], kind)[0].tau for kind in kinds]
        assert f"| {row} | {' | '.join(f'{tau:.2f}' for tau in taus)} |" in page
        log = read_log(kept.folders[study_report.Cell(name, 16, 1500, 0)])
        validated = {entry["step"]: f"{entry['eval_tau']:.2f}" for entry in log if "eval_tau" in entry}
        assert f"{short} {validated[300]}, {validated[900]}, {validated[1500]}" in page
        reach_rates.append(kept.acceptances(name, 16, 1500, [0])[0].reach_rate)
    first = [f"{rate[0]:.3f}" for rate in reach_rates]
    assert f"in a share of {first[0]} (the decay), {first[1]} (D-PACE) and {first[2]} (growing)" in page
    fourth = [f"{rate[3]:.3f}" for rate in reach_rates]
    assert f"all of slots 1 to 4 in {fourth[0]}, {fourth[1]} and {fourth[2]}" in page


def test_the_page_says_what_a_second_seed_gave(tmp_path):
    kept, page = unpack_records("study-6005-prompts-seed-1.tar.gz", tmp_path)
    gain, apart = (percent(kept.gain("dpace", "dflash", 16, 1500, kind)) for kind in ("", study.APART))
    assert f"(`study-6005-prompts-seed-1`) D-PACE gains {gain} over the decay, and {apart} on `apart`" in page


def test_the_page_says_what_bigrams_and_short_blocks_gave(tmp_path):
    kept, page = unpack_records("study-bigrams.tar.gz", tmp_path)
    kinds = ("", *study.KINDS, study.APART)
    decay, changed = (f"{kept.tau(name, 16, 400)[0]:.2f}" for name in ("dflash", "growing-bigrams"))
    assert f"Tau is {changed}, the decay's {decay}" in page
    gains = [percent(kept.gain("growing-bigrams", "dflash", 16, 400, kind)).replace(" %", "") for kind in kinds]
    assert f"| over the decay, % | {' | '.join(gains)} |" in page
    assert f"By seed: {kept.gains_by_seed('growing-bigrams', 'dflash', 16, 400)}." in page
    ours, decays = (mean_seconds(kept, name) for name in ("growing-bigrams", "dflash"))
    assert f"as long as the decay's**: {ours / decays:.2f} times, by the logs of seeds 0 to 3." in page


def test_the_page_says_what_prompts_of_the_target_gave(tmp_path):
    kept, page = unpack_records("study-own-prompts.tar.gz", tmp_path / "own")
    before, _ = unpack_records("study-bigrams.tar.gz", tmp_path / "before")
    kinds = ("", *study.KINDS, study.APART)
    sides = {}
    for name in ("dflash", "growing-bigrams"):
        for found in (before, kept):
            sides[found, name] = [found.acceptances(name, 16, 400, range(5), kind) for kind in kinds]
    rows = {
        "tau, the decay": [sides[kept, "dflash"]],
        "tau, the changes": [sides[kept, "growing-bigrams"]],
        "the changes over the decay, %": [sides[kept, "growing-bigrams"], sides[kept, "dflash"]],
        "the decay over itself without these prompts, %": [sides[kept, "dflash"], sides[before, "dflash"]],
        "the changes over themselves without them, %": [
            sides[kept, "growing-bigrams"],
            sides[before, "growing-bigrams"],
        ],
    }
    assert kept.ids == before.ids
    for shown, compared in rows.items():
        if len(compared) == 1:
            cells = [f"{tau_estimate([runs])[0]:.2f}" for runs in compared[0]]
        else:
            cells = [percent(tau_gain(*pair)).replace(" %", "") for pair in zip(*compared, strict=True)]
        assert f"| {shown} | {' | '.join(cells)} |" in page
    changed, decay = (sides[kept, name][-1] for name in ("growing-bigrams", "dflash"))
    apart = " ".join(f"{100 * (ours.tau / theirs.tau - 1):+.1f}" for ours, theirs in zip(changed, decay, strict=True))
    seeds = kept.gains_by_seed("growing-bigrams", "dflash", 16, 400)
    assert f"By seed: {seeds}; on `apart`, {apart}." in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    gain, gain_apart = (percent(kept.gain("growing-bigrams", "dflash", 16, 400, kind)) for kind in ("", study.APART))
    assert f"gain {gain.removeprefix('+')} over the decay, and {gain_apart.removeprefix('+')} on text of" in readme
    ours, decays = (mean_seconds(kept, name, range(5)) for name in ("growing-bigrams", "dflash"))
    assert f"A step of the changes takes {ours / decays:.2f} times as long as the decay's" in page


def gains_of(kept, name, over, steps):
    """The gain in blocks of 16 as the page writes it, and that on text apart."""
    return [percent(kept.gain(name, over, 16, steps, kind)).replace(" %", "") for kind in ("", study.APART)]


def loss_of(kept, name, over):
    """How much less tau is after 400 steps, in %."""
    gain, low, high = kept.gain(name, over, 16, 400)
    return f"{-100 * gain:.1f} % [{-100 * high:.1f}, {-100 * low:.1f}]"


def test_the_page_says_how_long_blocks_stay_short(tmp_path):
    kept, page = unpack_records("study-alone.tar.gz", tmp_path)
    for shown, name in (("1, 1, 1 and 1", "growing-blocks"), ("8, 4, 2 and 1", "parts-8-4-2-1")):
        gain, apart = gains_of(kept, name, "dflash", 400)
        assert f"| {shown} | {kept.tau(name, 16, 400)[0]:.2f} | {gain} | {apart} |" in page
    (acceptance,) = kept.acceptances("parts-8-4-2-1", 16, 400, [0])
    assert not any(acceptance.reach_rate[7:]) and all(acceptance.reach_rate[:7])
    base = "growing-bigrams-constant-rate"
    assert f"equal ones lose {loss_of(kept, f'{base}-parts-1-1-1-1', base)}" in page


CHANGES = {
    "layers 14, 21 and 27 of the target are read": "layers-14-21-27",
    "layers 20, 24 and 27": "layers-20-24-27",
    "five layers, from 1 to 27": "five-features",
    "seven layers": "seven-features",
    "three layers in the drafter": "three-layers",
    "one layer": "one-layer",
    "its MLP is half as wide": "narrow-mlp",
    "it begins with layers of the target, times 0.3": "target-layers",
    "two more answers of each prompt, at temperature 0.7": "sampled-answers",
    "D-PARD's loss, `-2 log sum sqrt(p q)` with weights of the overlap": "dpard-loss",
    "constant learning rate, which falls in the last fifth": "constant-rate",
}
"""What the page calls them, and what the record does."""
SAME_WORK = ("layers-14-21-27", "layers-20-24-27", "target-layers", "sampled-answers", "constant-rate")
"""A step takes as long as the base's."""


def test_the_page_says_what_methods_gave_alone(tmp_path):
    kept, page = unpack_records("study-alone.tar.gz", tmp_path)
    base = "growing-blocks"
    for shown, name in CHANGES.items():
        assert len(kept.seeds(16, (name, 400), (base, 400))) == 3
        gain, apart = gains_of(kept, name, base, 400)
        in_equal_time = percent(kept.gain_in_equal_seconds(name, base, 16, 400)).replace(" %", "")
        time = f"{kept.step_cost(name, base, 16):.2f} | {in_equal_time} |"
        if name in SAME_WORK:
            time = "| |"
        if name == "narrow-mlp":
            advice = " ".join((ROOT / "docs" / "train.md").read_text().split())
            assert f"a step takes {kept.step_cost(name, base, 16):.2f} of the time" in advice
        assert f"| {shown} | {gain} | {apart} | {time}" in page
    assert f"After 400 steps tau is {kept.tau(base, 16, 400)[0]:.2f}." in page
    drift = [kept.step_cost(name, base, 16) for name in SAME_WORK]
    assert f"took {min(drift):.2f} to {max(drift):.2f} times as long as the base's." in page
    decay = "dflash-narrow-mlp"
    assert f"the decay gains {percent(kept.gain(decay, 'dflash', 16, 400))} from it" in page
    assert f"with D-PACE are {percent(kept.gain('narrow-mlp', decay, 16, 400))} above that." in page
    loss = loss_of(kept, "growing-bigrams-constant-rate", "growing-bigrams")
    assert f"with [bigrams](#bigrams-and-short-blocks-for-longer), {loss}." in page


def test_the_page_says_what_methods_gave_after_100_steps(tmp_path):
    kept, page = unpack_records("study-alone.tar.gz", tmp_path)
    base = "growing-blocks"
    for shown, name in CHANGES.items():
        assert len(kept.seeds(16, (name, 100), (base, 100))) == 3
        gain, apart = gains_of(kept, name, base, 100)
        assert f"| {shown} | {gain} | {kept.gains_by_seed(name, base, 16, 100)} | {apart} |" in page
    taus = [f"{acceptance.tau:.2f}" for acceptance in kept.acceptances(base, 16, 100, range(3))]
    assert f"Tau of the base itself is {taus[0]}, {taus[1]} and {taus[2]}." in page


def mean_seconds(kept, name, seeds=range(4)):
    """The mean time of a step, over seeds."""
    logs = [read_log(kept.folders[study_report.Cell(name, 16, 400, seed)]) for seed in seeds]
    return fmean(fmean(entry["step_seconds"] for entry in log if "step_seconds" in entry) for log in logs)


def test_the_papers_matrix_draws_prompts_with_their_turns():
    """Turns differ, and prompts do not."""
    turns = [make_response(id=str(i // 2), turn=i % 2, accepted_lengths=[2 * (i % 2)]) for i in range(8)]
    assert paper.mean_over_sets([make_row(responses=turns)], paper.tau_of) == (2.0, 2.0, 2.0)
