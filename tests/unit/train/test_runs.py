"""A run goes on only with the same data, target and settings, and nothing of it or of others is lost."""

import errno
import hashlib
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dpace.cli import main
from dpace.loss import block_loss
from dpace.measure import heldout
from dpace.train.checkpoints import is_whole
from dpace.train.identity import read_run
from dpace.train.loop import TrainingLoop
from dpace.train.run import make_datasets, train
from tests.conftest import make_recipe
from tests.support.files import change_json, changed_json, read_json, write_prompts
from tests.unit.system.test_ledger import hold


def recipe_of(**changes):
    config = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "num_anchors": 4, "batch_size": 4, **changes}
    return make_recipe(**config)


def run(target, responses, folder, *, start=0, **changes):
    recipe = recipe_of(**changes)
    datasets = make_datasets(target, responses[start : start + 8], responses[50:52], recipe)
    return train(target, *datasets, recipe, folder)


def files_of(folder):
    """When each file was written; the lock is touched by whoever looks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".dpace.lock")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(language_target, language_responses, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "drafter"
    run(language_target, language_responses, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "drafter")
    return tmp_path / "drafter"


def test_a_finished_run_is_read_and_not_written(copied, language_target, language_responses):
    before = files_of(copied)
    again = run(language_target, language_responses, copied)
    assert files_of(copied) == before
    assert not [path for path in before if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert again.confidence_temperature == read_json(copied / "config.json")["dpace"]["confidence_temperature"]


def test_settings_that_change_no_result_go_on(finished, copied, language_target, language_responses):
    changes = {"logging_steps": 3, "save_steps": 1, "feature_cache_gib": 0.0, "gradient_checkpointing": True}
    (copied / "provenance.json").unlink()
    shutil.rmtree(copied / "checkpoints" / "checkpoint-4")
    run(language_target, language_responses, copied, **changes)
    assert (copied / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message", "is_finished"),
    [({"seed": 7}, "train.seed 42, not 7", True), ({"start": 1}, "other training answers", False)],
)
def test_another_run_is_refused_naming_one_difference(
    change, message, is_finished, copied, language_target, language_responses
):
    if not is_finished:
        (copied / "provenance.json").unlink()
    before = files_of(copied)
    with pytest.raises(ValueError, match=message) as refused:
        run(language_target, language_responses, copied, **change)
    assert files_of(copied) == before and len(str(refused.value)) < 300 + len(str(copied))


def test_another_target_is_refused(copied, language_target, language_responses):
    weight = language_target.head.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.mul_(1.01)
        with pytest.raises(ValueError, match="other weights of the target"):
            run(language_target, language_responses, copied)
        weight.copy_(kept)
        language_target.thinking = True
        with pytest.raises(ValueError, match="thinking false, not true"):
            run(language_target, language_responses, copied)
    finally:
        language_target.thinking = False
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoints", "recipe.yaml", "run.json"])
def test_files_of_others_are_not_touched(name, tmp_path, language_target, language_responses):
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match="drafter"):
        run(language_target, language_responses, folder)
    assert (folder / name).read_text() == "{}"


def test_a_damaged_checkpoint_is_not_taken(copied, language_target, language_responses, capsys):
    (copied / "provenance.json").unlink()
    last = copied / "checkpoints" / "checkpoint-4"
    expected = (copied / "model.safetensors").read_bytes()
    moments = (last / "optimizer.safetensors").read_bytes()
    cut, flipped = moments[:-9], moments[:-9] + b"x" + moments[-8:]
    for name, data in {"manifest.json": b"{", "optimizer.safetensors": cut}.items():
        whole = (last / name).read_bytes()
        (last / name).write_bytes(data)
        assert not is_whole(last)
        (last / name).unlink()
        assert not is_whole(last)
        (last / name).write_bytes(whole)
    assert is_whole(last)
    (last / "optimizer.safetensors").write_bytes(flipped)
    (copied / "checkpoints" / ".checkpoint-9.unfinished").mkdir()
    run(language_target, language_responses, copied)
    assert "checkpoint-4 is not whole" in capsys.readouterr().err
    assert is_whole(last) and (copied / "model.safetensors").read_bytes() == expected
    assert not list(copied.rglob("*.unfinished"))


def change_listed(folder, name, **changes):
    """Change a file of a checkpoint, and what its manifest says of it."""
    change_json(folder / name, **changes)
    with changed_json(folder / "manifest.json") as manifest:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_checkpoint_of_another_version_and_tokens_of_another_target_are_one_line(
    copied, language_target, language_responses
):
    (copied / "provenance.json").unlink()
    last = copied / "checkpoints" / "checkpoint-4"
    change_listed(last, "optimizer.json", groups=[])
    with pytest.raises(ValueError, match="checkpoint-4 has no state of this training's optimizer .*remove the folder"):
        run(language_target, language_responses, copied)
    change_listed(last, "trainer_state.json", newer=1)
    with pytest.raises(ValueError, match="trainer_state.json is of another version of dpace .*'newer'"):
        run(language_target, language_responses, copied)
    rows = [replace(row, token_ids=[64, *row.token_ids[1:]]) for row in language_responses]
    with pytest.raises(ValueError, match="have the token 64, and the target's embedding has 64 rows"):
        run(language_target, rows, copied.with_name("other"))


@pytest.mark.parametrize(("what", "value"), [("loss", math.nan), ("gradient", math.inf), ("weights", math.nan)])
def test_a_number_that_is_not_finite_ends_training(
    what, value, tmp_path, language_target, language_responses, monkeypatch
):
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
            with torch.no_grad():
                self.drafter.norm.weight[0] = value

    monkeypatch.setattr(TrainingLoop, "take_step", spoilt)
    with pytest.raises(ValueError, match=r"step 4.*lower --train.learning-rate"):
        run(language_target, language_responses, tmp_path / "d")
    assert is_whole(tmp_path / "d" / "checkpoints" / "checkpoint-2")
    assert not (tmp_path / "d" / "checkpoints" / "checkpoint-4").exists()
    assert not (tmp_path / "d" / "provenance.json").exists()


@pytest.mark.parametrize(
    ("name", "place", "work", "calls", "step", "times"),
    [("SIGINT", TrainingLoop, "take_step", 3, 3, 1), ("SIGTERM", heldout, "score_conversation", 1, 2, 2)],
)
def test_a_signal_saves_the_step_and_the_run_goes_on(
    name, place, work, calls, step, times, finished, tmp_path, language_target, language_responses, monkeypatch
):
    """In a step, which is finished; and twice in the first of two conversations, whose measurement is made again."""
    real, called = getattr(place, work), []

    def signalled(*args):
        called.append(args)
        if len(called) == calls:
            os.kill(os.getpid(), getattr(signal, name))
            os.kill(os.getpid(), getattr(signal, name))  # torchrun sends it on at once
        return real(*args)

    before = signal.getsignal(signal.SIGTERM)
    for _ in range(times):
        called.clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, work, signalled)
            with pytest.raises(KeyboardInterrupt) as ended:
                run(language_target, language_responses, tmp_path / "d")
        assert ended.value.args == (getattr(signal, name),) and len(called) == calls
    assert signal.getsignal(signal.SIGTERM) == before
    assert is_whole(tmp_path / "d" / "checkpoints" / f"checkpoint-{step}")
    run(language_target, language_responses, tmp_path / "d")
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    logs = [read_json(path / "trainer_state.json")["log_history"] for path in (tmp_path / "d", finished)]
    taus = [[(entry["step"], entry.get("eval_tau")) for entry in log] for log in logs]
    assert taus[0] == taus[1]


def test_a_step_may_be_split_anew_and_options_that_are_newer_count_as_their_default(
    finished, copied, language_target, language_responses
):
    """A run of an earlier version goes on from its second step."""
    (copied / "provenance.json").unlink()
    shutil.rmtree(copied / "checkpoints" / "checkpoint-4")
    with changed_json(copied / "run.json") as facts:
        assert facts["conversations_per_step"] == 4 and facts.pop("train.grow_blocks") is False
    with pytest.raises(ValueError, match="conversations_per_step 4, not 2; keep the product of --train.batch-size"):
        run(language_target, language_responses, copied, batch_size=2)
    run(language_target, language_responses, copied, batch_size=1, gradient_accumulation_steps=4)
    path = "checkpoints/checkpoint-4/model.safetensors"
    found, expected = (load_file(folder / path) for folder in (copied, finished))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)


def test_tau_after_a_kill_before_the_end_is_that_of_an_undisturbed_run(
    tmp_path, language_target, language_responses, monkeypatch
):
    """Where the drafter computes in bf16 and was trained in the process before."""
    monkeypatch.setattr("dpace.train.loop.default_dtype", lambda device: torch.bfloat16)
    run(language_target, language_responses, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("dpace.train.run.write_finished", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(language_target, language_responses, tmp_path / "killed")
    run(language_target, language_responses, tmp_path / "killed")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_writer(copied, language_target, language_responses):
    (copied / "provenance.json").unlink()
    with hold(copied) as other:
        try:
            with pytest.raises(ValueError, match=f"process {other.pid} .* is writing to"):
                run(language_target, language_responses, copied)
        finally:
            other.kill()


@pytest.mark.parametrize("place", ["optimizer.json", "provenance.json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    place, finished, tmp_path, language_target, language_responses, monkeypatch
):
    """Full when step 4 is saved, or after it; a whole checkpoint stays, and nothing half written takes room."""
    fsync = os.fsync

    def full(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if place in path and ("checkpoint-2" not in path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device; make room") as refused:
            run(language_target, language_responses, tmp_path / "d")
    assert "\n" not in str(refused.value) and not list((tmp_path / "d").rglob("*.unfinished"))
    assert any(map(is_whole, (tmp_path / "d" / "checkpoints").iterdir()))
    run(language_target, language_responses, tmp_path / "d")
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


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


def change_meta(out, **changes):
    change_json(out / "responses.meta.json", **changes)


ANSWERS = {
    "half": (lambda out: change_meta(out, complete=False), [], "run the same `dpace respond` command again"),
    "no meta": (lambda out: (out / "responses.meta.json").unlink(), [], "no meta file"),
    "no target": (lambda out: (out / "responses.meta.json").write_text('{"complete": true}'), [], "which target made"),
    "bad meta": (lambda out: (out / "responses.meta.json").write_text("{"), [], "responses.meta.json"),
    "changed": (lambda out: change_meta(out, responses_sha256="0" * 64), [], "was changed"),
    "thinking": (lambda out: None, ["--thinking"], "thinking false, not true"),
    "dtype": (lambda out: None, ["--dtype", "bfloat16"], 'dtype "float32", not "bfloat16"'),
    "weights": (lambda out: change_meta(out, target_sha256="0" * 64), [], "other weights of the target"),
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_answers_that_are_not_the_targets_are_refused(fault, answered, tmp_path, capsys):
    out, flags = answered
    change, extra, message = ANSWERS[fault]
    shutil.copytree(out, tmp_path / "out")
    change(tmp_path / "out")
    assert main(["train", *flags, "--output", str(tmp_path / "out"), *extra]) == 1
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "out" / "drafter").exists()
    assert len([line for line in error.splitlines() if line.startswith("dpace train:")]) == 1


def test_train_twice_and_with_more_answers(answered, tmp_path, capsys):
    """The second time reads what is there; with other answers the old weights are not passed off as new."""
    out, flags = answered
    shutil.copytree(out, tmp_path / "out")
    flags = [*flags, "--output", str(tmp_path / "out")]
    assert main(["train", *flags]) == 0
    before = files_of(tmp_path / "out" / "drafter")
    capsys.readouterr()
    assert main(["train", *flags, "--train.logging-steps", "5"]) == 0
    assert files_of(tmp_path / "out" / "drafter") == before
    said = capsys.readouterr()
    assert "drafter is finished" in said.err and "disk:" not in said.err and "next: dpace bench" in said.out
    assert main(["train", *flags, "--prompts.limit", "9"]) == 1
    assert "other training answers" in capsys.readouterr().err
    assert files_of(tmp_path / "out" / "drafter") == before
    assert read_run(tmp_path / "out" / "drafter")["train.max_steps"] == 2


def test_a_finished_drafter_is_trained_further_as_the_message_says(answered, tmp_path, capsys):
    out, flags = answered
    shutil.copytree(out, tmp_path / "out")
    flags = [*flags, "--output", str(tmp_path / "out")]
    assert main(["train", *flags]) == 0
    assert main(["train", *flags, "--train.max-steps", "4"]) == 1
    error = capsys.readouterr().err
    advice = r"train.max_steps 2, not 4; to train it further, run `mv (\S+) (\S+)`, then add (\S+) (\S+), or"
    found = re.search(advice, error)
    assert found, error
    Path(found[1]).rename(found[2])
    assert main(["train", *flags, "--train.max-steps", "4", found[3], found[4]]) == 0
    assert read_run(tmp_path / "out" / "drafter")["train.max_steps"] == 4
