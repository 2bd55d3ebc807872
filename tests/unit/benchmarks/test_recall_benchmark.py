"""benchmarks/recall.py with its command, at tiny size."""

import json
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "recall.py"


def test_the_command_prints_the_bars(
    endless_folder, random_drafter_folder, language_responses, tmp_path, monkeypatch, capsys
):
    shutil.copytree(random_drafter_folder, tmp_path / "dpace" / "seed-42")
    lines = [json.dumps(asdict(response)) for response in language_responses[:5]]
    (tmp_path / "responses.jsonl").write_text("\n".join(lines) + "\n")
    size = "--requests 3 --per-set 1 --tokens 8 --memory 2000".split()
    monkeypatch.setattr(sys, "argv", ["recall.py", str(tmp_path), "--target", str(endless_folder), *size])
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    for part in ("similar (3)", "problems (1)", "random", "warm", "look-up among 2000 tokens"):
        assert part in printed
    assert "…" not in printed
    rows = [line for line in printed.splitlines() if "similar" in line]
    assert len(rows) == 6 and all("3/3" in row for row in rows)
