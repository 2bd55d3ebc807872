"""A run goes on only with the same data, target and settings, and nothing of it or of others is lost."""

import math
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dpace.engines.read import read_drafter
from dpace.recipes.recipe_file import read_recipe
from dpace.training.checkpoints import is_whole
from dpace.training.loop import TrainingLoop
from dpace.training.run import make_datasets, train
from tests.support.files import HOLD, change_json, changed_weights, read_json
from tests.support.models import make_recipe


@pytest.fixture(scope="module")
def run(language_target, language_responses):
    """Train into a folder, on eight answers from a number on."""

    def run(folder, start=0, num_validated=2, **changes):
        config = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "num_anchors": 4, "batch_size": 4, **changes}
        recipe = make_recipe(**config)
        responses = language_responses[start : start + 8], language_responses[50 : 50 + num_validated]
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


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_finished_run_is_read_and_not_written(copied, run):
    before = files_of(copied)
    again = run(copied)
    assert files_of(copied) == before
    assert not [path for path in before if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert again.confidence_temperature == read_json(copied / "config.json")["dpace"]["confidence_temperature"]


def test_another_run_is_refused_naming_one_difference(copied, run, language_target, monkeypatch):
    def refuse(message, **changes):
        before = files_of(copied)
        with pytest.raises(ValueError, match=message):
            run(copied, **changes)
        assert files_of(copied) == before

    refuse("train.seed 42, not 7", seed=7)
    refuse("max_steps 4, not 6; .* to train a finished drafter further, .* --drafter.init", max_steps=6)
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
    assert read_drafter(copied / "checkpoints" / "checkpoint-4").spec.block_size == 6, "which is one to start from"


def test_a_run_has_the_numbers_that_auto_stands_for(tmp_path, run):
    """So a run of a recipe that has the numbers goes on with one that has auto."""
    auto = {"norm_scale": "auto", "intermediate_size": "auto"}
    run(tmp_path, drafter=auto)
    written = read_recipe(tmp_path / "recipe.yaml").drafter
    assert 0 < written.norm_scale < 1 and written.intermediate_size == 32
    before = files_of(tmp_path)
    for drafter in (auto, {name: getattr(written, name) for name in auto}):
        run(tmp_path, drafter=drafter)
    assert files_of(tmp_path) == before
    for name, value in (("norm_scale", 0.5), ("intermediate_size", 40)):
        with pytest.raises(ValueError, match=f"drafter.{name} {getattr(written, name)}, not {value}"):
            run(tmp_path, drafter=auto | {name: value})


def test_settings_that_change_no_result_may_change(unfinished, run, finished):
    """And how a step is split."""
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-4")
    with pytest.raises(ValueError, match="conversations_per_step 4, not 2"):
        run(unfinished, batch_size=2)
    others = {"logging_steps": 3, "save_steps": 1, "feature_cache_gib": 0.0, "gradient_checkpointing": True}
    run(unfinished, batch_size=1, gradient_accumulation_steps=4, **others)
    path = "checkpoints/checkpoint-4/model.safetensors"
    found, expected = (load_file(folder / path) for folder in (unfinished, finished))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)


def test_a_checkpoint_that_is_not_whole_or_damaged_is_not_taken(unfinished, run, finished, capsys):
    last = unfinished / "checkpoints" / "checkpoint-4"
    os.truncate(last / "optimizer.safetensors", 100)
    with pytest.raises(ValueError, match="checkpoint-4 are damaged .*remove that folder"):
        run(unfinished)
    (last / "trainer_state.json").unlink()
    (unfinished / "checkpoints" / ".checkpoint-9.unfinished").mkdir()
    run(unfinished)
    assert "checkpoint-4 is not whole" in capsys.readouterr().err and is_whole(last)
    assert not list(unfinished.rglob("*.unfinished")) and weights_of(unfinished) == weights_of(finished)


STATES = {
    "there is no key 'is_local_process_zero'": {"is_local_process_zero": True},
    "global_step is '4', expected a valid integer": {"global_step": "4"},
    "best_global_step is .7., expected a valid integer": {"best_global_step": [7]},
    "log_history is 7, expected a valid array": {"log_history": 7},
}


@pytest.mark.parametrize("reason", STATES)
def test_a_checkpoint_of_another_version_is_named(reason, unfinished, run):
    change_json(unfinished / "checkpoints" / "checkpoint-4" / "trainer_state.json", **STATES[reason])
    with pytest.raises(ValueError, match=f"checkpoint-4/trainer_state.json: {reason}.*; remove that folder"):
        run(unfinished)


MOMENTS = {
    "has no moments": lambda moments: moments.clear(),
    r"0.exp_avg has the shape \[2\], expected": lambda moments: moments.update({"0.exp_avg": torch.zeros(2)}),
    "list index out of range": lambda moments: moments.update({"999.step": torch.zeros(())}),
}


@pytest.mark.parametrize("reason", MOMENTS)
def test_moments_of_another_optimizer_are_not_taken(reason, unfinished, run):
    with changed_weights(unfinished / "checkpoints" / "checkpoint-4", "optimizer.safetensors") as moments:
        MOMENTS[reason](moments)
    with pytest.raises(ValueError, match=f"cannot load .*checkpoint-4: .*{reason}.*; remove that folder"):
        run(unfinished)


@pytest.mark.parametrize("what", ["gradient", "weights"])
def test_a_number_that_is_not_finite_ends_training(what, tmp_path, run, monkeypatch):
    """The last good checkpoint stays."""
    take_step = TrainingLoop.take_step

    def spoilt(self, batches):
        weight, is_last = self.drafter.norm.weight, self.state.global_step == 3
        if is_last and what == "gradient":
            weight.register_hook(lambda grad: grad + math.inf)
        take_step(self, batches)
        if is_last and what == "weights":
            weight.data[0] = math.nan

    monkeypatch.setattr(TrainingLoop, "take_step", spoilt)
    with pytest.raises(ValueError, match=r"step 4.*lower --train.learning-rate"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "provenance.json").exists()


def test_a_signal_saves_the_step_and_the_run_goes_on(tmp_path, run, finished, monkeypatch):
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
            patch.setattr("dpace.training.progress.SAME_SIGNAL_SECONDS", seconds)
            with pytest.raises(KeyboardInterrupt) as ended:
                run(tmp_path / folder)
            assert ended.value.args == (signal.SIGTERM,)
            assert is_whole(tmp_path / folder / "checkpoints" / "checkpoint-3") == has_saved
    assert signal.getsignal(signal.SIGTERM) == before
    run(tmp_path / "a")
    assert weights_of(tmp_path / "a") == weights_of(finished)


def test_tau_after_a_kill_before_the_end_is_that_of_an_undisturbed_run(tmp_path, run, monkeypatch):
    """Where the drafter computes in bf16 and was trained in the process before."""
    monkeypatch.setattr("dpace.training.loop.default_dtype", lambda device: torch.bfloat16)
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("dpace.training.run.write_finished", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    run(tmp_path / "killed")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_writer(tmp_path, run):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is writing to .* with --output$"):
            run(tmp_path)
        other.kill()
