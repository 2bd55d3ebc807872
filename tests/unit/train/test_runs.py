"""A run goes on only with the same data, target and settings, and nothing of it or of others is lost."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dpace.batches.corpus import Answers
from dpace.cli import main
from dpace.config import PromptsConfig, Recipe
from dpace.loss import block_loss
from dpace.train.checkpoints import is_whole
from dpace.train.identity import read_run
from dpace.train.loop import TrainingLoop
from dpace.train.run import make_datasets, train
from tests.conftest import make_recipe
from tests.support.files import change_json, changed_json, read_json, write_prompts
from tests.unit.system.test_ledger import HOLD


@pytest.fixture(scope="module")
def run(language_target, language_responses):
    """Train into a folder, on eight answers from a number on."""

    def run(folder, start=0, **changes):
        config = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "num_anchors": 4, "batch_size": 4, **changes}
        recipe = make_recipe(**config)
        responses = language_responses[start : start + 8], language_responses[50:52]
        return train(language_target, *make_datasets(language_target, *responses, recipe), recipe, folder)

    return run


def files_of(folder):
    """When each file was written; the lock is touched by whoever looks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".dpace.lock")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "drafter"
    run(folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "drafter")


@pytest.fixture
def unfinished(copied):
    """As it is left by a process that was killed before its end."""
    (copied / "provenance.json").unlink()
    return copied


@pytest.fixture
def same_weights(finished):
    def check(folder):
        assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()

    return check


def test_a_finished_run_is_read_and_not_written(copied, run):
    before = files_of(copied)
    again = run(copied)
    assert files_of(copied) == before
    assert not [path for path in before if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert again.confidence_temperature == read_json(copied / "config.json")["dpace"]["confidence_temperature"]


def test_another_run_is_refused_naming_one_difference(copied, run, language_target, monkeypatch):
    def refuse(message, **changes):
        before = files_of(copied)
        with pytest.raises(ValueError, match=message) as refused:
            run(copied, **changes)
        assert files_of(copied) == before and len(str(refused.value)) < 300 + len(str(copied))

    refuse("train.seed 42, not 7", seed=7)
    with monkeypatch.context() as patch:
        patch.setattr(language_target, "thinking", True)
        refuse("thinking false, not true")
    weight = language_target.head.weight
    kept = weight.clone()
    with torch.no_grad():
        weight.mul_(1.01)
        refuse("other weights of the target")
        weight.copy_(kept)
    (copied / "provenance.json").unlink()
    refuse("other training answers", start=1)


def test_settings_that_change_no_result_may_change(unfinished, run, finished):
    """And how a step is split; an option that is newer than the run counts as its default."""
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-4")
    with changed_json(unfinished / "run.json") as facts:
        assert facts["conversations_per_step"] == 4 and facts.pop("train.grow_blocks") is False
    with pytest.raises(ValueError, match="conversations_per_step 4, not 2; keep the product of --train.batch-size"):
        run(unfinished, batch_size=2)
    others = {"logging_steps": 3, "save_steps": 1, "feature_cache_gib": 0.0, "gradient_checkpointing": True}
    run(unfinished, batch_size=1, gradient_accumulation_steps=4, **others)
    path = "checkpoints/checkpoint-4/model.safetensors"
    found, expected = (load_file(folder / path) for folder in (unfinished, finished))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints", "run.json"])
def test_files_of_others_are_not_touched(name, tmp_path, run):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="was not written by dpace"):
        run(tmp_path)
    assert (tmp_path / name).read_text() == "{}"


def test_a_damaged_checkpoint_is_not_taken(unfinished, run, same_weights, capsys):
    last = unfinished / "checkpoints" / "checkpoint-4"
    moments = (last / "optimizer.safetensors").read_bytes()
    flipped = moments[:-9] + b"x" + moments[-8:]
    for name, data in (("manifest.json", b"{"), ("optimizer.safetensors", moments[:-9])):
        whole = (last / name).read_bytes()
        (last / name).write_bytes(data)
        assert not is_whole(last)
        (last / name).unlink()
        assert not is_whole(last)
        (last / name).write_bytes(whole)
    assert is_whole(last)
    (last / "optimizer.safetensors").write_bytes(flipped)
    (unfinished / "checkpoints" / ".checkpoint-9.unfinished").mkdir()
    run(unfinished)
    assert "checkpoint-4 is not whole" in capsys.readouterr().err and is_whole(last)
    assert not list(unfinished.rglob("*.unfinished"))
    same_weights(unfinished)


@pytest.mark.parametrize(("what", "value"), [("loss", math.nan), ("gradient", math.inf), ("weights", math.nan)])
def test_a_number_that_is_not_finite_ends_training(what, value, tmp_path, run, monkeypatch):
    """The last good checkpoint stays."""
    take_step = TrainingLoop.take_step

    def spoilt(self, batches):
        is_last = self.state.global_step == 3
        with monkeypatch.context() as patch:
            if is_last and what == "loss":
                patch.setattr("dpace.train.loop.block_loss", lambda *a, **k: value * block_loss(*a, **k))
            if is_last and what == "gradient":
                self.drafter.norm.weight.register_hook(lambda grad: grad + value)
            take_step(self, batches)
        if is_last and what == "weights":
            self.drafter.norm.weight.data[0] = value

    monkeypatch.setattr(TrainingLoop, "take_step", spoilt)
    with pytest.raises(ValueError, match=r"step 4.*lower --train.learning-rate"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert is_whole(tmp_path / "checkpoints" / "checkpoint-2") and not (tmp_path / "provenance.json").exists()


def test_a_signal_saves_the_step_and_the_run_goes_on(tmp_path, run, same_weights, monkeypatch):
    """torchrun sends it on at once, so two in a row are one; a later one ends the step."""
    take_step = TrainingLoop.take_step

    def signalled(self, batches):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self, batches)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "take_step", signalled)
        for folder, seconds, has_saved in (("a", 60.0, True), ("b", -1.0, False)):
            patch.setattr("dpace.train.progress.SAME_SIGNAL_SECONDS", seconds)
            with pytest.raises(KeyboardInterrupt) as ended:
                run(tmp_path / folder)
            assert ended.value.args == (signal.SIGTERM,)
            assert is_whole(tmp_path / folder / "checkpoints" / "checkpoint-3") == has_saved
    assert signal.getsignal(signal.SIGTERM) == before
    run(tmp_path / "a")
    same_weights(tmp_path / "a")


def test_tau_after_a_kill_before_the_end_is_that_of_an_undisturbed_run(tmp_path, run, monkeypatch):
    """Where the drafter computes in bf16 and was trained in the process before."""
    monkeypatch.setattr("dpace.train.loop.default_dtype", lambda device: torch.bfloat16)
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("dpace.train.run.write_finished", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    run(tmp_path / "killed")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_writer(tmp_path, run):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        try:
            with pytest.raises(ValueError, match=f"process {other.pid} .* is writing to"):
                run(tmp_path)
        finally:
            other.kill()


@pytest.fixture(scope="module")
def answered(language_folder, language_prompts, tmp_path_factory):
    """The flags of a run whose prompts are answered."""
    folder = tmp_path_factory.mktemp("verbs")
    prompts = write_prompts(folder / "prompts.jsonl", language_prompts[:30])
    flags = ["--target", str(language_folder), "--prompts.path", prompts, "--respond.max-new-tokens", "16"]
    flags += ["--drafter.num-layers", "1", "--drafter.block-size", "4", "--train.max-steps", "2"]
    flags += ["--train.logging-steps", "100", "--train.num-anchors", "4"]
    assert main(["respond", *flags, "--output", str(folder / "out")]) == 0
    return folder / "out", flags


def test_answers_that_are_not_the_targets_are_refused(answered, tmp_path):
    out, flags = answered
    recipe = Recipe(prompts=PromptsConfig(path=flags[3]), output=str(tmp_path / "out"))

    def refuse(message, recipe=recipe, **changes):
        shutil.copytree(out, tmp_path / "out", dirs_exist_ok=True)
        change_json(tmp_path / "out" / "responses.meta.json", **changes)
        with pytest.raises(ValueError, match=message):
            Answers(recipe, "dpace respond").refuse_others({"target_sha256": "1" * 64, "dtype": "bfloat16"})

    refuse("run the same command again: `dpace respond`", complete=False)
    refuse("was changed", responses_sha256="0" * 64)
    refuse("other weights of the target")
    refuse('dtype "float32", not "bfloat16"', target_sha256="1" * 64)
    refuse("thinking false, not true", replace(recipe, thinking=True))
    (out / "responses.meta.json").rename(tmp_path / "meta.json")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="no meta file .* which target made"):
        Answers(replace(recipe, output=str(out)), "dpace respond")
    (tmp_path / "meta.json").rename(out / "responses.meta.json")


def test_a_finished_drafter_is_read_and_trained_further_as_the_message_says(answered, tmp_path, capsys):
    """With other answers or more steps, the old weights are not passed off as new."""
    out, flags = answered
    shutil.copytree(out, tmp_path / "out")
    drafter = tmp_path / "out" / "drafter"
    words = ["train", *flags, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    before = files_of(drafter)
    capsys.readouterr()
    assert main([*words, "--train.logging-steps", "5"]) == 0
    said = capsys.readouterr()
    assert "drafter is finished" in said.err and "disk:" not in said.err and "next: dpace bench" in said.out
    assert main([*words, "--prompts.limit", "9"]) == 1
    assert "other training answers" in capsys.readouterr().err
    assert main([*words, "--train.max-steps", "4"]) == 1
    advice = r"train.max_steps 2, not 4; to train it further, run `mv (\S+) (\S+)`, then add (\S+) (\S+), or"
    found = re.search(advice, capsys.readouterr().err)
    assert found and files_of(drafter) == before
    Path(found[1]).rename(found[2])
    assert main([*words, "--train.max-steps", "4", found[3], found[4]]) == 0
    assert (read_run(drafter) or {})["train.max_steps"] == 4
