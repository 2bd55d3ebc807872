"""benchmarks/break_even.py with the command of the page, at tiny size."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "break_even.py"


def test_the_command_of_the_page_times_refused_drafts(language_folder, random_drafter_folder, monkeypatch, capsys):
    size = ["--contexts", "1", "20", "--requests", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["break_even.py", str(language_folder), str(random_drafter_folder), *size])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: [float(cell) for cell in line[1:]] for line in lines if line and line[0] in ("1", "20")}
    assert len(rows) == 2 and all(len(row) == 2 and min(row) > 0 for row in rows.values())
