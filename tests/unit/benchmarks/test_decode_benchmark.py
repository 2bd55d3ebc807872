"""benchmarks/decode.py with the command of the page, at tiny size."""

import pytest

from tests.support.scripts import run_script


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the loops of others
def test_the_command_of_the_page_compares_all_ways(endless_folder, random_drafter_folder, monkeypatch, capsys):
    size = "--rounds 1 --prompts 1 --tokens 4".split()
    ways = ["--ways", "any token", "dpace, width", "random drafter", "T=1", "transformers", "drafts alone"]
    monkeypatch.setenv("COLUMNS", "80")
    run_script("decode.py", endless_folder, random_drafter_folder, *size, *ways)
    table = capsys.readouterr().out
    for way in ("plain", "dpace, auto", "dpace, width 2", "any token", "T=1: dpace, auto", "transformers, DFlash"):
        assert way in table
    assert "…" not in table
    parts = "plain, dpace, auto, drafts alone, random drafter, auto"
    assert table.count(f"dpace, auto, over the best of {parts}: ") == 2
