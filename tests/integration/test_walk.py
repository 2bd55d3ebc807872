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
from dpace.recipes.recipe_file import read_recipe, read_settings
from dpace.training.run import check_recipe
from tests.support.families import make_sharp_target
from tests.support.files import write_prompts
from tests.support.models import BYTE_TOKENIZER, BYTE_TOKENS, write_target_gguf
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
        read, checked = mock.Mock(wraps=read_settings), mock.Mock(wraps=check_recipe)
        patch.setattr("dpace.recipes.flags.read_settings", read)
        patch.setattr("dpace.training.run.check_recipe", checked)
        printed = run(train)
    assert read.call_count == checked.call_count == 1
    assert "training, dpace: 1 of 10" in printed[1]
    for least, is_told in ((1.0, False), (99.0, True)):
        monkeypatch.setattr("dpace.metrics.LEAST_TAU", least)
        printed = run(train)[1]
        assert "drafters: 1 kept, 0 to come" in printed
        assert bool(re.search(r"no drafter accepts anything yet \(tau \d.\d\d\)", printed)) == is_told, printed
    refused = run(f"{train} --max-steps 12", code=1)[1]
    assert "to train a finished drafter further, rename its folder, and name that with --drafter.init" in refused
    shutil.move("dpace-out/drafter", "dpace-out/drafter-before")
    printed = run(f"{train} --max-steps 12 --drafter.init dpace-out/drafter-before")
    printed = run(next_of(printed))
    assert "decoding: " in printed[1]
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
    assert json.loads(run(f"{words} --max-new-tokens 4 --json '{prompt}'")[0])["tau"] >= 1
    assert re.search(r"--spec-draft-n-max [1-5]\b", (tmp_path / "served" / "README.md").read_text())


@pytest.mark.wide
def test_the_laptop_path_of_a_file_that_llamacpp_cannot_draft_for(run, language_prompts, tmp_path, monkeypatch):
    """It is told at the first step, and every title is the file's name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = make_sharp_target("qwen2", vocab_size=len(BYTE_TOKENS), num_hidden_layers=8)
    write_target_gguf(target, tmp_path / "mine.gguf", "qwen2", **BYTE_TOKENIZER)
    write_prompts(tmp_path / "prompts.jsonl", language_prompts[:20])
    laptop = "laptop --target mine.gguf --respond.max-new-tokens 8"
    told = "llama.cpp cannot draft for qwen2; `dpace generate` can"
    assert told in run(f"dpace plan {laptop}")[0] and told in run(f"dpace respond {laptop}")[1]
    run(f"dpace train {laptop} --max-steps 2 --eval-steps 2")
    drafter = read_recipe("dpace-laptop/drafter/recipe.yaml").drafter
    assert drafter.norm_scale == 0.1 and drafter.intermediate_size == 32
    table = " ".join(run(f"dpace bench {laptop} --num-prompts 1")[0].split())
    assert "Speed: mine.gguf" in table and "`dpace bench --server URL --plain-server URL` compares" in table
    run("dpace report dpace-laptop --output report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<title>Drafters for mine.gguf" in page and str(tmp_path) not in page
    last = "dpace-laptop/drafter --target mine.gguf"
    assert "fails, engine: gguf: the target is a qwen2" in run(f"dpace doctor {last} --engine gguf", code=1)[1]
    assert "use `dpace generate`" in run(f"dpace export {last} --to gguf --output served", code=1)[1]
