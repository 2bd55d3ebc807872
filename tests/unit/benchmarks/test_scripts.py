"""Each script of benchmarks/ starts by its command line, at its smallest size; study.py is in `test_study.py`."""

import json
import re
import sys

import pytest

from dpace.prompts.public_sets import SETS
from tests.support.files import write_rows
from tests.support.scripts import BENCHMARKS, run_script

SCRIPTS = {path.name for path in BENCHMARKS.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}


def test_each_script_is_named_by_a_page_or_started_by_another():
    root = BENCHMARKS.parent
    pages = "".join(page.read_text() for page in [root / "README.md", *(root / "docs").glob("*.md")])
    inner = {"engines_child.py", "llamacpp.py", "make_prompts.py", "respond_server.py"}
    named = {name for name in SCRIPTS if f"benchmarks/{name}" in pages}
    assert named | inner == SCRIPTS


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the loops of others
def test_decode(endless_folder, random_drafter_folder, monkeypatch, capsys):
    size = "--rounds 1 --prompts 1 --tokens 4".split()
    ways = ["--ways", "dpace, width", "random drafter", "T=1", "transformers", "drafts alone"]
    monkeypatch.setenv("COLUMNS", "90")
    run_script("decode.py", endless_folder, random_drafter_folder, *size, *ways)
    table = capsys.readouterr().out
    for way in ("plain", "dpace, auto", "dpace, width 2", "T=1: dpace, auto", "transformers, DFlash"):
        assert way in table
    parts = "plain, dpace, auto, drafts alone, random drafter, auto"
    assert " ".join(table.split()).count(f"dpace, auto, over the best of {parts}: ") == 2


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_engines(language_folder, language_drafter_folder, target_gguf, monkeypatch, capsys):
    """All that are installed give one text and one tau."""
    monkeypatch.setenv("COLUMNS", "150")
    size = ["--rounds", "1", "--prompts", "1", "--tokens", "6", "--precisions", "float16"]
    run_script("engines.py", language_folder, language_drafter_folder, "--gguf", target_gguf, *size)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if re.search(r" 2/2 +2/2 ", line)]
    assert {row.split(",")[0].strip() for row in rows} >= {"dpace", "transformers", "llama.cpp"}
    whole = [line for line in rows if "width auto" not in line]
    assert len({re.search(r" 2/2 +2/2 +(\S+)", line)[1] for line in whole}) == 1, "tau"
    assert "vLLM, not installed" in printed


def test_zlab_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "dflash", None)
    with pytest.raises(SystemExit, match="^z-lab's package `dflash` is not installed: pip install .*$"):
        run_script("zlab.py", "target", "drafter")


def test_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(SystemExit, match="^torch finds no accelerator here; this benchmark is for one GPU$"):
        run_script("gpu.py", "--random")


def test_loss(capsys):
    run_script("loss.py", "--shape", "8192", "64", "32", "--rounds", "1")
    printed = capsys.readouterr().out
    assert re.search(r"^ +8192 +64 +32 +frozen-head ", printed, re.MULTILINE)
    assert "frozen-head over checkpointed: time" in printed


@pytest.mark.wide
def test_overhead(language_folder, capsys):
    run_script("overhead.py", "1", language_folder)
    printed = capsys.readouterr().out
    assert len(re.findall(r"tokens  dpace +[\d.]+ ms  x [\d.]+ \[", printed)) == 2
    for name in ("drafter", "loss", "backward pass", "clipping, optimizer", "whole step"):
        assert len(re.findall(rf"^  {name} +[\d.]+ ms +[\d.]+ GFLOP +\d+% of that$", printed, re.MULTILINE)) == 2


def test_respond_by_shared_beginnings(language_folder, capsys):
    size = "--prompts 6 --tokens 4 --batch-size 4".split()
    run_script("respond.py", "--beginnings", "--target", language_folder, *size)
    table = capsys.readouterr().out
    assert "; 6 of 6 texts equal" in table and "; 2 of 2 texts equal" in table


def test_respond_from_a_server(capsys):
    run_script("respond.py", "--seconds", "0.001", "--concurrencies", "1", "2")
    assert re.search(r"^ +1 +[\d.]+ +1\.00\n +2 +[\d.]+ +[\d.]+$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.wide
def test_paper(language_folder, tmp_path, monkeypatch, capsys):
    """At its small size, on tiny files of its sets; the same command again trains nothing."""
    monkeypatch.setenv("COLUMNS", "160")
    for name in SETS:
        write_rows(tmp_path / f"{name}.jsonl", [{"turns": ["w1 w51"]}])
    write_rows(tmp_path / "x_train.jsonl", [{"turns": [f"w{i} w51"]} for i in range(12)])
    out = tmp_path / "out"
    size = ["--num-prompts", "12", "--tiny", "--target", language_folder]
    written = []
    for _ in range(2):
        run_script("paper.py", out, "--small", "--data-dir", tmp_path, *size)
        written.append([path.stat().st_mtime_ns for path in sorted(out.glob("*/*/model.safetensors"))])
        assert re.search(r"dpace +3 1 .* 2\.96, 4\.19, \+8\.5%", capsys.readouterr().out)
    assert written[0] == written[1] and len(written[0]) == 2


def test_make_prompts(tmp_path):
    run_script("make_prompts.py", tmp_path, "tuning")
    rows = (tmp_path / "tuning.jsonl").read_text().splitlines()
    assert len(rows) == 32 and {json.loads(row)["set"] for row in rows} == {"notes", "problems"}
