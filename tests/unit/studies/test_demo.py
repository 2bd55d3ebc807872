"""The demo on the tiny target, through the command line."""

import re
from unittest.mock import Mock

import pytest

from dpace.config import DemoConfig
from dpace.studies.demo import demo_prompts, demo_recipe, demo_sizes, remarks
from tests.support.files import write_rows
from tests.support.rows import make_compared, make_row


@pytest.fixture
def flags(language_folder, language_prompts, tmp_path) -> list[str]:
    """Options of a demo with prompts of two sets."""
    rows = [{"prompt": text, "set": f"set{int(i % 8 == 0)}"} for i, text in enumerate(language_prompts)]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    return ["--target", str(language_folder), "--prompts", path, "--output", str(tmp_path / "out")]


def test_what_is_slower_or_worse_has_a_reason():
    slow = make_row(set="a", width="auto", decode_speedup=(0.5, None, None))
    fast = make_row(set="b", width="auto", share_copied=0.5, temperature=1.0)
    alone = make_row(set="b", width="copies", temperature=1.0)
    worse, better = make_compared(gain=(-0.1, -0.2, -0.05)), make_compared(gain=(0.1, 0.05, 0.2))
    assert not [*remarks([fast], [better])], "copies alone were not measured"
    copied, slower, behind = remarks([slow, fast, alone], [worse, better])
    assert copied.startswith("b, T=1: many tokens were copied") and slower.startswith("a: slower than")
    assert behind.startswith("s: D-PACE is behind")


def test_quick_takes_fewer_prompts_and_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no demo was begun
    whole, quick = demo_sizes(DemoConfig())
    assert demo_recipe(quick).train.max_steps < demo_recipe(whole).train.max_steps
    parts = zip(demo_prompts(quick), demo_prompts(whole), strict=True)
    assert [0 < len(fewer) < len(prompts) for fewer, prompts in parts] == [True, False, True]


@pytest.mark.parametrize(
    ("speed", "asked", "name"),
    [
        (1e15, [], "whole"),
        (1e6, [], "quick"),
        (1e6, ["--full"], "whole"),
        (1e15, ["--quick"], "quick"),
    ],
)
def test_the_whole_demo_runs_where_it_ends_in_time(speed, asked, name, flags, short_demo, run_line, monkeypatch):
    """It says so before it starts; what was begun goes on, also where the speed was measured otherwise."""
    for module in ("plan.speed", "plan.training", "studies.demo"):
        monkeypatch.setattr(f"dpace.{module}.measure_flops", lambda *_: speed)
    trained = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("dpace.training.loop.TrainingLoop.take_step", trained)
    said = run_line(["demo", *flags, *asked], 130).err
    assert re.match(f"the {name} demo, about [0-9,]+ minutes? on this machine; ", said)
    for module in ("plan.speed", "plan.training", "studies.demo"):
        monkeypatch.setattr(f"dpace.{module}.measure_flops", lambda *_: 1e21 / speed)
    assert run_line(["demo", *flags], 130).err.startswith(f"the {name} demo, ") and trained.call_count == 2


def test_two_sizes_at_once_are_refused(run_line):
    assert "leave one of them out" in run_line("demo --quick --full", 1).err


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
    for module in ("plan.training", "training.initial", "target.locate"):  # the last is where the others take it from
        monkeypatch.setattr(f"dpace.{module}.find_target", lambda _: pytest.fail("the target was looked for"))
    path = out = tmp_path / "out"
    if is_foreign:
        path = out / WRITERS[line]
        out.mkdir()
    path.write_text("mine")
    said = run_line(f"{line} --output {out}", 1).err
    refusals = "out: File exists; |was not written by dpace .*; |has no responses.meta.json .*; "
    assert re.search(refusals, said)
