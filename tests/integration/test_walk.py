"""A newcomer's way through the commands on the tiny target: each one follows what the one before printed."""

import os
import re
import shlex
import shutil
import signal

import pytest
import yaml
from llamacpp import run_llamacpp

from dpace.cli import main
from dpace.measure.results import read_results
from dpace.train.loop import TrainingLoop
from tests.support.files import read_json, write_prompts

RECIPE = {
    "prompts": {"path": "prompts.jsonl"},
    "respond": {"max_new_tokens": 24},
    "drafter": {"num_layers": 2, "num_features": 2, "block_size": 6},
    "train": {"learning_rate": 5e-3, "max_steps": 30, "batch_size": 8, "num_anchors": 12, "eval_steps": 10},
    "bench": {"max_new_tokens": 24, "temperatures": [0.0, 1.0], "num_prompts": 3},
}
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


def test_from_prompts_to_a_served_drafter(
    run, language_folder, language_target, language_prompts, target_gguf, tmp_path, monkeypatch
):
    write_prompts(tmp_path / "prompts.jsonl", language_prompts)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": str(language_folder), **RECIPE}))
    refused = run("dpace train recipe.yaml", code=1)[1]
    respond = next_of(run("dpace plan recipe.yaml"))
    assert f"`{respond}`" in refused
    printed = run(respond)
    assert "answering prompts: " in printed[1]
    train = next_of(printed)
    assert train == "dpace train recipe.yaml"

    take_step = TrainingLoop.take_step

    def interrupted(loop, batches):
        os.kill(os.getpid(), signal.SIGINT)
        return take_step(loop, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "take_step", interrupted)
        assert "run the same command to continue" in run(train, code=130)[1]
    printed = run(train)
    assert "training, dpace: 2 of 30" in printed[1]
    assert "dpace-out/drafter is finished" in run(train)[1]
    refused = run(f"{train} --max-steps 34", code=1)[1]
    found = re.search(r"run `mv (\S+) (\S+)`, then add (--drafter.init [^ ,]+)", refused)
    assert found, refused
    shutil.move(found[1], found[2])
    printed = run(f"{train} --max-steps 34 {found[3]}")

    printed = run(next_of(printed))
    assert "decoding: " in printed[1] and "the target's code: packed weights, grouped heads, fused layers" in printed[1]
    generate = next_of(printed)
    run("dpace bench recipe.yaml --widths 4 --temperatures 0")
    results = read_results(tmp_path / "dpace-out" / "results.json")
    ways = {(row.temperature, row.width) for row in results.rows}
    assert ways == {(0.0, 4), *((temperature, width) for temperature in (0.0, 1.0) for width in ("full", "auto"))}
    assert sum(row.num_same_text for row in results.rows) == sum(row.num_responses for row in results.rows) == 15
    greedy = next(row for row in results.rows if row.width == "full")
    assert greedy.tau > 1
    assert sum(greedy.histogram) == sum(len(response.accepted_lengths) for response in greedy.responses)
    assert run(f"dpace check --target {language_folder} --drafter dpace-out/drafter {CHECK}")[0].endswith("passed\n")

    export = f"dpace export dpace-out/drafter --target {language_folder}"
    assert "is the drafter's own folder" in run(f"{export} --to vllm --output dpace-out/drafter", code=1)[1]
    run(f"{export} --to vllm --output served")
    assert "removed from served, where" in run(f"{export} --to gguf --target-gguf {target_gguf} --output served")[1]
    run(f"dpace import served --target {language_folder} --output again")
    kept, trained = (read_json(tmp_path / name / "config.json") for name in ("again", "dpace-out/drafter"))
    assert kept["dpace"] == trained["dpace"] and "confidence_temperature" in kept["dpace"]

    prompt = language_prompts[-1]
    plain = run(f"dpace generate --target {language_folder} --prompt '{prompt}' --max-new-tokens 24")[0]
    options = f"--prompt '{prompt}' --max-new-tokens 24"
    assert run(f"{generate} {options}")[0] == plain
    assert run(f"dpace generate --target {language_folder} --drafter again {options}")[0] == plain
    (file,) = (tmp_path / "served").glob("*.gguf")
    count = re.search(r"--spec-draft-n-max (\d+)", (tmp_path / "served" / "README.md").read_text())
    token_ids = language_target.tokenizer(f"ask {prompt} answer")["input_ids"]
    served = {"max_new_tokens": 24, "drafter_gguf": file, "num_draft_tokens": int(count[1])}
    (answer,) = run_llamacpp(target_gguf, [token_ids], **served)
    assert language_target.tokenizer.decode(answer.token_ids, skip_special_tokens=True) == plain.strip()
