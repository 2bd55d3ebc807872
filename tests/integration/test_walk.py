"""A newcomer's way through the commands on the tiny target: each one follows what the one before printed."""

import io
import json
import re
import shlex
import shutil
from unittest import mock

import pytest
import yaml

from dpace.cli import main
from dpace.measure.results import read_results
from dpace.recipes.recipe_file import read_settings
from dpace.target.locate import find_target
from dpace.training.run import check_recipe
from tests.support.files import write_prompts
from tests.unit.test_pages import TINY

CHECK = "--prompts prompts.jsonl --num-prompts 1 --max-new-tokens 6"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a line of the shell in a folder of its own; give what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, code: int = 0) -> tuple[str, str]:
        dpace, *words = shlex.split(line)
        found = main(words)
        printed = capsys.readouterr()
        assert dpace == "dpace" and found == code, f"{line}\n{printed.err}"
        return printed

    return run


def next_of(printed: tuple[str, str]) -> str:
    """The command that a verb says comes next."""
    return printed[0].rpartition("next: ")[2].strip()


def test_from_prompts_to_an_exported_drafter(
    run, language_folder, language_prompts, target_gguf, tmp_path, monkeypatch
):
    write_prompts(tmp_path / "prompts.jsonl", language_prompts[:30])
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"target": str(language_folder), "prompts": {"path": "prompts.jsonl"}, **TINY})
    )
    refused = run("dpace train recipe.yaml", code=1)[1]
    respond = next_of(run("dpace plan recipe.yaml"))
    assert f"`{respond}`" in refused
    printed = run(respond)
    assert "answering prompts: " in printed[1]
    train = next_of(printed)
    assert train == "dpace train recipe.yaml"
    with monkeypatch.context() as patch:
        read, checked, found = (
            mock.Mock(wraps=read_settings),
            mock.Mock(wraps=check_recipe),
            mock.Mock(wraps=find_target),
        )
        patch.setattr("dpace.recipes.flags.read_settings", read)
        patch.setattr("dpace.training.run.check_recipe", checked)
        for module in ("plan.training", "training.initial", "target.locate"):
            patch.setattr(f"dpace.{module}.find_target", found)
        printed = run(train)
    assert read.call_count == checked.call_count == found.call_count == 1
    assert "training, dpace: 1 of 10" in printed[1]
    for least, is_told in ((1.0, False), (99.0, True)):
        monkeypatch.setattr("dpace.verbs.LEAST_TAU", least)
        printed = run(train)[1]
        assert "drafters: 1 kept, 0 to come" in printed
        assert bool(re.search(r"no drafter accepts anything yet \(tau \d.\d\d\)", printed)) == is_told, printed
    refused = run(f"{train} --max-steps 12", code=1)[1]
    assert "to train a finished drafter further, rename its folder, and name that with --drafter.init" in refused
    shutil.move("dpace-out/drafter", "dpace-out/drafter-before")
    printed = run(f"{train} --max-steps 12 --drafter.init dpace-out/drafter-before")
    printed = run(next_of(printed))
    assert "decoding: " in printed[1] and "the target's code: packed weights, grouped heads, fused layers" in printed[1]
    generate = next_of(printed)
    assert "--prompt 'prompts.jsonl#" in generate
    run(f"{generate} --max-new-tokens 4")
    rows = read_results(tmp_path / "dpace-out" / "results.json").rows
    assert len(rows) == 2 and all(row.num_same_text == row.num_responses == 1 for row in rows)
    assert run(f"dpace check --target {language_folder} --drafter dpace-out/drafter {CHECK}")[0].endswith("passed\n")

    export = f"dpace export dpace-out/drafter --target {language_folder}"
    run(f"{export} --to gguf --target-gguf {target_gguf} --output served")

    prompt = language_prompts[-1]
    options = f"--prompt '{prompt}' --max-new-tokens 24"
    plain = run(f"dpace generate --target {language_folder} {options}")[0]
    assert run(f"{generate} {options}")[0] == plain
    words, flags = f"dpace generate --target {language_folder}", "--drafter dpace-out/drafter --max-new-tokens 24"
    assert run(f"{words} {flags} '{prompt}'")[0] == plain
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\n"))
    answer = json.loads(run(f"{words} {flags} --json")[0])
    assert f"{answer['text']}\n" == plain and answer["tau"] >= 1 and answer["decode_seconds"] > 0
    assert "no prompt to answer" in run(f"{words} --json", code=1)[1]
    assert json.loads(run(f"{words} --max-new-tokens 4 --json '{prompt}'")[0])["tau"] is None
    assert re.search(r"--spec-draft-n-max [1-5]\b", (tmp_path / "served" / "README.md").read_text())
