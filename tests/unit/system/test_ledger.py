"""Files are written whole or not at all, by one process at a time, and never over what dpace did not write."""

import errno
import fcntl
import json
import os
from unittest import mock

import pytest
from safetensors import SafetensorError

from dpace.system.ledger import (
    UNFINISHED,
    cut_unfinished_line,
    filling,
    lock_folder,
    read_jsonl,
    register_files,
    remove_files,
    write_json,
    write_text,
    writing,
)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    before = path.stat()
    write_json(path, {"a": 1})
    assert path.stat().st_mtime_ns == before.st_mtime_ns, "what is there already is not written again"

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "other")
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))


def test_a_folder_is_locked_twice_by_one_process_and_refused_without_locks(tmp_path, monkeypatch):
    (tmp_path / f".x.json.1{UNFINISHED}").touch()
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".dpace.lock"], "what a killed process left is removed"
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(OSError, match=r"No locks available: .*\.dpace.lock"), lock_folder(tmp_path):
        pass


def test_a_line_that_is_not_finished_is_left_out_and_cut(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\n\n{"a": 2')
    assert list(read_jsonl(path, is_growing=True)) == [(1, {"a": "\u2028"})]
    with pytest.raises(ValueError, match=r"x.jsonl:3: the line is not JSON"):
        list(read_jsonl(path))
    cut_unfinished_line(path)
    cut_unfinished_line(tmp_path / "none")
    assert path.read_bytes().endswith(b"}\n\n")


def test_what_dpace_did_not_write_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("the user's")
    with pytest.raises(ValueError, match=r"config.json was not written by dpace"):
        register_files(tmp_path, "config.json", "a.gguf")
    register_files(tmp_path, "a.gguf", "b.gguf", "c.gguf")
    for name in ("a.gguf", "b.gguf", "mine.gguf"):
        (tmp_path / name).touch()
    register_files(tmp_path, "b.gguf")
    assert remove_files(tmp_path, ["*.gguf"], keep=["b.gguf"]) == ["a.gguf"]
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"a.gguf was not written by dpace"):
        register_files(tmp_path, "a.gguf")
    assert (tmp_path / "mine.gguf").exists()
    register_files(tmp_path / "new" / "folder", "a.gguf")


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new"
    for content in ("old", "new"):
        with pytest.raises(ZeroDivisionError), filling(folder) as aside:
            (aside / "config.json").write_text("half")
            raise ZeroDivisionError
        assert folder.exists() == (content == "new")
        with filling(folder) as aside:
            (aside / "config.json").write_text(content)
        assert (folder / "config.json").read_text() == content


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("12288 requested and 2880 written"),  # numpy
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_names_the_folder_whoever_meets_it(error, tmp_path):
    with (
        pytest.raises(OSError, match="No space left") as found,
        filling(tmp_path / "a") as aside,
        filling(aside),
    ):
        raise error
    assert found.value.errno == errno.ENOSPC and found.value.filename == str(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(OSError, match="No space left.*b"), writing(tmp_path / "b"):
        raise error


def test_others_can_read_what_is_written(tmp_path):
    before = os.umask(0o027)
    try:
        with filling(tmp_path / "drafter") as aside:
            (aside / "weights").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "drafter" / "weights").stat().st_mode & 0o777 == 0o640
