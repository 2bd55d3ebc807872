"""The demo on the tiny target, through the command line."""

import re
from unittest.mock import Mock

import pytest

from dpace.config import DemoConfig
from dpace.studies.demo import demo_prompts, demo_recipe
from tests.support.files import write_rows


@pytest.fixture
def flags(language_folder, language_prompts, tmp_path) -> list[str]:
    """Options of a demo with prompts of two sets."""
    rows = [{"prompt": text, "set": f"set{int(i % 8 == 0)}"} for i, text in enumerate(language_prompts)]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    return ["--target", str(language_folder), "--prompts", path, "--output", str(tmp_path / "out")]


def test_quick_takes_fewer_prompts_and_steps():
    whole, quick = DemoConfig(), DemoConfig(quick=True)
    assert demo_recipe(quick).train.max_steps < demo_recipe(whole).train.max_steps
    assert demo_recipe(quick).output != demo_recipe(whole).output
    parts = zip(demo_prompts(quick), demo_prompts(whole), strict=True)
    assert [0 < len(fewer) < len(prompts) for fewer, prompts in parts] == [True, False, True]


def test_it_says_how_long_the_rest_takes_from_what_it_measured(flags, short_demo, run_line, monkeypatch):
    """A demo that goes on says it no more; one of another length is refused."""
    # Of 6 answers; then for each recipe of the hidden states of these 6 to train on and the same 6 to score, of a
    # training of one step, or three where blocks grow, and of 6 scored ones.
    measured = iter([60.0, 60.0, 30.0, 120.0, 120.0, 30.0, 60.0])
    monkeypatch.setattr("dpace.studies.demo._seconds", lambda work: (work(), next(measured))[1])
    taken = Mock(side_effect=[None] * 4 + [KeyboardInterrupt] * 2)
    monkeypatch.setattr("dpace.training.loop.TrainingLoop.take_step", taken)
    # 6 prompts are held out, 5 validate and 49 train: 54 more answers, hidden states of 60 conversations, and for each
    # drafter some steps and 11 scored answers.
    minutes = round((54 * 10 + 60 * (5 + 10) + 2 * (4 * 30 + 11 * 20) + 4 * 10 + 11 * 10) / 60)
    said = run_line(["demo", *flags], 130).err
    assert f"\nabout {minutes} minutes more, as measured in this run\n" in said
    assert " more, " not in run_line(["demo", *flags], 130).err and taken.call_count == 6
    assert "train.max_steps" in run_line(["demo", "--quick", *flags], 1).err


WRITERS = {
    "demo": "results.json",
    "compare": "results.json",
    "respond": "responses.jsonl",
    "bench --drafters .": "results.json",
}
"""Verbs, and a file that they write."""


@pytest.mark.parametrize("line", WRITERS)
@pytest.mark.parametrize("is_foreign", [False, True])
def test_the_output_is_refused_before_the_target_is_looked_for(line, is_foreign, run_line, tmp_path, monkeypatch):
    """The demo's target is a download."""
    monkeypatch.setattr("dpace.target.files.find_target", lambda _: pytest.fail("the target was looked for"))
    path = out = tmp_path / "out"
    if is_foreign:
        path = out / WRITERS[line]
        out.mkdir()
    path.write_text("mine")
    said = run_line(f"{line} --output {out}", 1).err
    refusals = "out: File exists; |was not written by dpace .*; |has no responses.meta.json .*; "
    assert re.search(refusals, said)
