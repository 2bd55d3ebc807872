"""benchmarks/decode.py with the command of the page, at tiny size."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "decode.py"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the loops of others
def test_the_command_of_the_page_compares_all_ways(endless_folder, random_drafter_folder, monkeypatch, capsys):
    size = ["--rounds", "1", "--prompts", "1", "--tokens", "4"]
    ways = ["--ways", "any token", "dpace, width", "random drafter", "T=1", "transformers", "drafts alone"]
    monkeypatch.setattr(sys, "argv", ["decode.py", str(endless_folder), str(random_drafter_folder), *size, *ways])
    monkeypatch.setenv("COLUMNS", "80")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = capsys.readouterr().out
    for way in ("plain", "dpace, auto", "dpace, width 2", "any token", "T=1: dpace, auto", "transformers, DFlash"):
        assert way in table
    assert "…" not in table
    parts = "plain, dpace, auto, drafts alone, random drafter, auto"
    assert table.count(f"dpace, auto, over the best of {parts}: ") == 2
