"""The demo on the tiny target, through the command line."""

import re
import subprocess
import sys

import pytest

from dpace.cli import main
from dpace.measure.results import CompareResults, read_results
from dpace.recipes import RECIPES
from dpace.studies.demo import summary
from tests.support.files import write_rows


@pytest.fixture
def flags(language_folder, language_prompts, tmp_path) -> list[str]:
    """Options of a demo with prompts of two sets."""
    rows = [{"prompt": text, "set": f"set{int(i % 8 == 0)}"} for i, text in enumerate(language_prompts)]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    return ["--target", str(language_folder), "--prompts", path, "--output", str(tmp_path / "out")]


def test_both_objectives_are_compared(flags, tmp_path, capsys, monkeypatch):
    """A row for each set and objective and for all sets together; the same command again trains nothing."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "respond: {max_new_tokens: 16}\n"
        "drafter: {num_layers: 1, block_size: 4}\n"
        "train: {max_steps: 4, batch_size: 4, num_anchors: 4, max_length: 64, eval_steps: 2}\n"
        "bench: {temperatures: [0.0], max_new_tokens: 8, num_prompts: 2}\n"
    )
    monkeypatch.setitem(RECIPES, "demo-cpu", recipe)
    assert main(["demo", *flags]) == 0
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "out" / "results.json")
    assert isinstance(results, CompareResults) and results.seeds == [42]
    assert [row.set for row in results.rows] == ["set0", "set0", "set1", "set1", "all", "all"]
    counts = {row.set: sum(row.histogram) for row in results.rows if row.drafter == "dpace"}
    assert counts["all"] == counts["set0"] + counts["set1"]
    lines = summary(results)
    assert "lossless: 16 of 16" in lines[0] and "all 6 held-out prompts: tau of D-PACE over" in lines[-1]
    assert all(line in printed for line in lines) and re.search(r"next: dpace generate .*/dpace/seed-42 ", printed)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Objectives, " in page and "decode_speedup" in page
    monkeypatch.setattr("dpace.studies.compare.train", lambda *_, **__: pytest.fail("trained again"))
    assert main(["demo", *flags]) == 0


@pytest.mark.parametrize("verb", ["demo", "compare"])
@pytest.mark.parametrize("taken", ["out", "out/results.json"])
def test_the_output_is_refused_before_the_target_is_looked_for(verb, taken, tmp_path, capsys, monkeypatch):
    """The demo's target is a download."""
    for module in ("plan.training", "engines.initial", "target.locate"):  # the last is where the others take it from
        monkeypatch.setattr(f"dpace.{module}.find_target", lambda _: pytest.fail("the target was looked for"))
    path = tmp_path / taken
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert main([verb, "--output", str(tmp_path / "out")]) == 1
    assert re.search(r"out: File exists; |results.json was not written by dpace .*; ", capsys.readouterr().err)


def test_no_bar_of_a_library_without_a_terminal():
    """transformers draws one for the tensors of a GGUF file with tqdm itself."""
    code = "from dpace.cli import main; main(['report', '--help']); from tqdm.auto import tqdm; list(tqdm('abc'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
