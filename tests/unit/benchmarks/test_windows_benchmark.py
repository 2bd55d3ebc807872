"""benchmarks/windows.py with its command, at tiny size."""

from tests.support.files import read_json, write_rows
from tests.support.scripts import run_script


def test_the_command_trains_measures_and_goes_on(language_folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"turns": [f"w{i % 40} w51"], "reference": f"w{i % 40 + 1} w{i % 40 + 2}"} for i in range(400)]
    write_rows(data / "words_train.jsonl", rows)
    out = tmp_path / "out"
    size = "--window 12 --contexts 24 100 --conversations 6 --turns 1 --steps 2 --prompts 1 --rounds 1 --tokens 12"
    monkeypatch.setenv("COLUMNS", "200")

    def run(*more):
        run_script("windows.py", language_folder, "--data", data, "--output", out, *size.split(), *more)
        return read_json(out / "windows.json")

    first = run()
    assert [row["drafter"] for row in first] == ["no window", "window"] * 2
    assert all(row["same_text"] == "1/1" and row["tau"] >= 1 for row in first)
    assert first[1]["cache_bytes"] <= first[0]["cache_bytes"] < first[2]["cache_bytes"]
    assert "ms a draft" in capsys.readouterr().out
    written = (out / "window" / "model.safetensors").stat().st_mtime_ns
    again = run("--drafters", out / "no-window", out / "window")
    assert [row["cache_bytes"] for row in again] == [row["cache_bytes"] for row in first]
    assert (out / "window" / "model.safetensors").stat().st_mtime_ns == written
