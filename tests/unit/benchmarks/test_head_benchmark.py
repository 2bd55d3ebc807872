"""benchmarks/head.py with its command, at tiny size."""

import runpy
import sys
from pathlib import Path

from tests.conftest import make_drafter, make_with_head
from tests.support.files import write_prompts

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "head.py"


def test_the_command_compares_a_drafter_with_and_without_its_head(
    language_folder, language_target, language_prompts, tmp_path, monkeypatch, capsys
):
    write_prompts(tmp_path / "prompts.jsonl", language_prompts[50:])
    make_with_head(language_target).save_pretrained(tmp_path / "head")
    make_drafter(language_target).save_pretrained(tmp_path / "other")
    monkeypatch.setenv("COLUMNS", "150")
    for more in ([], ["--without", str(tmp_path / "other")]):
        size = ["--rounds", "1", "--prompts", "2", "--tokens", "6", *more]
        size += ["--prompts-file", str(tmp_path / "prompts.jsonl")]
        monkeypatch.setattr(sys, "argv", ["head.py", str(language_folder), str(tmp_path / "head"), *size])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        table = capsys.readouterr().out
        assert "the walk costs" in table and table.count("tokens/s") == 2 and table.count(" tau ") == 1
