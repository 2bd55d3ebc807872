"""benchmarks/respond.py with its command, at tiny size."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "respond.py"


def test_answers_before_and_with_the_tree_are_equal(language_folder, monkeypatch, capsys):
    size = ["--prompts", "6", "--tokens", "4", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["respond.py", "--beginnings", "--target", str(language_folder), *size])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = capsys.readouterr().out
    assert "; 6 of 6 texts equal" in table and "; 2 of 2 texts equal" in table
