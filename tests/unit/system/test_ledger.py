"""Files are written whole or not at all, by one process at a time, and never over what dpace did not write."""

import json
import os
import subprocess
import sys
import time

import pytest

from dpace.system.ledger import filling, lock_folder, make_readable, read_jsonl, register_files, write_json, write_text


def test_every_character_stays_in_its_line(tmp_path):
    text = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh"
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n" + json.dumps({"n": 2}) + "\n")
    assert list(read_jsonl(path)) == [(1, {"text": text}), (3, {"n": 2})]


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


def test_one_writer_at_a_time(tmp_path):
    lines = [
        "import time",
        "from dpace.system.ledger import lock_folder",
        f"with lock_folder({str(tmp_path)!r}):",
    ]
    code = "\n".join([*lines, "    print('held', flush=True)", "    time.sleep(60)"])
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {other.pid} .* is writing to"), lock_folder(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    for _ in range(50):  # a killed process holds nothing
        try:
            with lock_folder(tmp_path):
                return
        except ValueError:
            time.sleep(0.1)
    raise AssertionError("the lock of a killed process was never free")


def test_what_dpace_did_not_write_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("the user's")
    with pytest.raises(ValueError, match=r"config.json was not written by dpace"):
        register_files(tmp_path, "config.json", "README.md")
    register_files(tmp_path, "README.md")
    (tmp_path / "README.md").write_text("ours")
    register_files(tmp_path, "README.md", "results.json")
    (tmp_path / "results.json").write_text("ours too")
    register_files(tmp_path, "results.json")


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
    (tmp_path / "config.json").write_text("the user's")
    with pytest.raises(ValueError, match="was not written by dpace"), filling(tmp_path) as aside:
        (aside / "config.json").touch()
    assert (tmp_path / "config.json").read_text() == "the user's"


def test_others_can_read_what_is_written(tmp_path):
    before = os.umask(0o027)
    try:
        path = tmp_path / "weights"
        path.touch(0o600)
        make_readable(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
