"""Each script of benchmarks/ starts by its command line, at its smallest size."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from dpace.engines.gguf import open_gguf
from tests.support.cases import wide
from tests.support.files import write_rows
from tests.support.models import BYTE_TOKENIZER, BYTE_TOKENS, make_target, write_target_gguf
from tests.support.scripts import BENCHMARKS, run_script

DECODE = "decode.py {target} {drafter} --rounds 1 --prompts 1 --tokens 4"
DECODE += " --ways 'dpace, width' 'random drafter' T=1 transformers 'drafts alone'"
ENGINES = "engines.py {target} {drafter} --gguf {gguf} --rounds 1 --prompts 1 --tokens 6 --precisions float16"
DEPTHS = "depths.py {gguf} {drafter_gguf} --depths 1 3@0.5 --port 8470 --bench --target {target} --sets gsm8k"
DEPTHS += " --sets-dir {data} --output {out} --temperatures 0 --bench.max-new-tokens 4"
EXPLAIN = "explain.py {target} {drafter} --prompts {data}/prompts.jsonl --num-prompts 6 --num-blocks 2"
EXPLAIN += " --num-samples 4 --max-new-tokens 8"
LOSS = "loss.py --shape 8192 64 32 --rounds 1"
GGUF = "gguf_target.py {served} --data {data} --sets gsm8k --num-prompts 3 --max-new-tokens 6"
RESPOND = "respond.py --target {target} --prompts 6 --tokens 4 --batch-size 4"
OVERHEAD = "overhead.py 1 {target}"
PAPER = "paper.py {out} --small --data-dir {data} --num-prompts 12 --tiny --target {target}"
STUDY = "study.py --data {data} --output {out} --target {target} --blocks 8 --steps 400 1600 --seeds 0 --scale 0.0025"
STUDY += " --more-prompts {data}/prompts.jsonl --objectives spec-auf dpace:drafter.num_layers=1"
OWN_PROMPTS = "study.py --data {data} --prompts {data}/prompts.jsonl --output {out} --target {target} --blocks 8"
OWN_PROMPTS += " --steps 200 --seeds 0 --max-new-tokens 8 --num-evals 2 --scale 0.01 --objectives growing-blocks"
PRINTED = {
    DECODE: [
        *(f" {way}[ ,]" for way in ("dpace, width 2", "T=1: dpace, auto", "transformers, DFlash")),
    ],
    ENGINES: [r"dpace.* 2/2 2/2 (\S+) .*transformers.* 2/2 2/2 \1 .*llama.cpp.* 2/2 2/2 \1 ", "vLLM, not installed"],
    GGUF: ["llama.cpp that dpace chooses too: .* dpace: ./3 texts equal .* llama.cpp, 4 at a time: ./3 texts equal"],
    DEPTHS: ["Depth: .* llama.cpp .* best depth: gsm8k"],
    EXPLAIN: [r"6 prompts, \d+ blocks, temperature 1; .* 1 100.0 .* all .* \d+ to \d+ % \[\d+, \d+\]$"],
    LOSS: [" 8192 64 32 frozen-head .* 8192 64 32 materialized .* 1\\.00$"],
    RESPOND: ["; 6 of 6 texts equal", "; 2 of 2 texts equal"],
    OVERHEAD: [r"(tokens dpace [\d.]+ ms x [\d.]+ \[.*){2}", r"(products in \w+ [\d.]+ ms, planned [\d.]+ ms ?){2}"],
    PAPER: [r"dpace 3 1 .* 2\.96, 4\.19, \+8\.5%"],
    STUDY: ["8 drafters to train", "written: .*study.md"],
    OWN_PROMPTS: ["3 drafters to train", "written: .*study.md"],
}
"""What each prints; white space counts as one space."""


@pytest.fixture
def run(endless_folder, random_drafter_folder, random_drafter_gguf, target_gguf, tmp_path, monkeypatch, capsys):
    """Run a script, and give what it printed."""
    (data := tmp_path / "data").mkdir()
    for name in "gsm8k math500 humaneval mbpp mt_bench alpaca".split():
        write_rows(data / f"{name}.jsonl", [{"turns": [f"w{i} w50"]} for i in range(3)])
    for name in ("gsm8k", "math", "mbpp"):
        write_rows(data / f"{name}_train.jsonl", [{"turns": [f"w{i} w51"]} for i in range(8)])
    write_rows(data / "prompts.jsonl", [{"id": f"code/{i}", "prompt": f"w{i} w52"} for i in range(40)])
    (tmp_path / "drafter.gguf").write_bytes(random_drafter_gguf)
    served = tmp_path / "served.gguf"
    write_target_gguf(make_target("qwen3", vocab_size=len(BYTE_TOKENS)), served, **BYTE_TOKENIZER)
    names = {
        "drafter_gguf": tmp_path / "drafter.gguf",
        "target": endless_folder,
        "drafter": random_drafter_folder,
        "gguf": target_gguf,
        "served": served,
        "data": data,
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")

    def run(command: str) -> str:
        run_script(*shlex.split(command.format(**names, out=tmp_path / "out")))
        return " ".join(capsys.readouterr().out.split())

    return run


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the loops of others
@pytest.mark.parametrize("command", wide(PRINTED, DECODE, EXPLAIN, LOSS, RESPOND))
def test_a_script_prints_what_it_measured(command, run):
    printed = run(command)
    for pattern in PRINTED[command]:
        assert re.search(pattern, printed), printed


@pytest.mark.wide
@pytest.mark.parametrize("command", [PAPER, STUDY])
def test_the_same_command_trains_nothing(command, run, tmp_path):
    written = []
    for _ in range(2):
        run(command)
        written.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")})
    assert written[0] == written[1] and len(written[0]) > 1


def test_box_prompts_are_of_all_kinds_and_none_is_measured(run, tmp_path):
    task = "Write a python function to compute the cube of a number."
    run("box_prompts.py {data} {out}")  # which makes the folders
    rows = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert {row["set"] for row in rows} == {"problems", "mathematics", "code", "notes"}
    cubes = [row for row in rows if "compute the cube of a number" in row["messages"][0]["content"]]
    assert len(rows) == len({row["id"] for row in rows}) and len(cubes) == 1
    write_rows(tmp_path / "data" / "mbpp.jsonl", [{"turns": [task]}])
    run("box_prompts.py {data} {out} 1")
    assert "compute the cube of a number" not in (tmp_path / "out" / "prompts.jsonl").read_text()


@pytest.mark.wide
def test_mutants_are_caught_and_nothing_runs_twice(tmp_path):
    """In a process of its own, since here dpace is imported."""
    command = [
        sys.executable,
        BENCHMARKS / "mutants.py",
        tmp_path / "out.jsonl",
        "--files",
        "weights.py",
        "--number",
        "2",
    ]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert re.search("[12] of 2 caught$", done.stdout.strip()), done.stderr[-2000:]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1 + 2  # first a copy without a change


def test_a_target_in_another_kind_of_matrices(run, tmp_path):
    run("gguf_target.py {served} --write-as Q8_0 {out}.gguf")
    tensors = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(tmp_path / "out.gguf")[0].tensors}
    assert tensors["blk.0.ffn_down.weight"] == "Q8_0" and tensors["output_norm.weight"] == "F32"
