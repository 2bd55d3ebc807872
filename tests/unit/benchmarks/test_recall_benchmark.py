"""benchmarks/recall.py with its command, at tiny size."""

import shutil
from dataclasses import asdict

from tests.support.files import write_rows
from tests.support.scripts import run_script


def test_the_command_prints_the_bars(
    endless_folder, random_drafter_folder, language_responses, tmp_path, monkeypatch, capsys
):
    shutil.copytree(random_drafter_folder, tmp_path / "dpace" / "seed-42")
    write_rows(tmp_path / "responses.jsonl", map(asdict, language_responses[:5]))
    size = "--requests 3 --per-set 1 --tokens 8 --memory 2000 --target".split()
    monkeypatch.setenv("COLUMNS", "80")
    run_script("recall.py", tmp_path, *size, endless_folder)
    printed = capsys.readouterr().out
    for part in ("similar (3)", "problems (1)", "random", "warm", "look-up among 2000 tokens"):
        assert part in printed
    assert "…" not in printed
    rows = [line for line in printed.splitlines() if "similar" in line]
    assert len(rows) == 6 and all("3/3" in row for row in rows)
