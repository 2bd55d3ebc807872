"""benchmarks/head.py with its command, at tiny size."""

from tests.conftest import make_drafter, make_with_head
from tests.support.files import write_prompts
from tests.support.scripts import run_script


def test_the_command_compares_a_drafter_with_and_without_its_head(
    language_folder, language_target, language_prompts, tmp_path, monkeypatch, capsys
):
    prompts = write_prompts(tmp_path / "prompts.jsonl", language_prompts[50:])
    make_with_head(language_target).save_pretrained(tmp_path / "head")
    make_drafter(language_target).save_pretrained(tmp_path / "other")
    monkeypatch.setenv("COLUMNS", "150")
    size = "--rounds 1 --prompts 2 --tokens 6 --prompts-file".split()
    for more in ([], ["--without", tmp_path / "other"]):
        run_script("head.py", language_folder, tmp_path / "head", *size, prompts, *more)
        table = capsys.readouterr().out
        assert "the walk costs" in table and table.count("tokens/s") == 2 and table.count(" tau ") == 1
