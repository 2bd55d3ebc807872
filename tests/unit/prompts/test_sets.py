import json
import sys
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import datasets
import pytest

from dpace.prompts.public_sets import MATH_SUFFIX, NOT_THERE, REDHAT_SUBSETS, SETS, read_sets
from tests.support.files import write_prompts, write_rows

PAPER = ["gsm8k", "math500", "humaneval", "mbpp", "mt_bench", "alpaca"]


HUB = {
    ("openai/gsm8k", "main", "test"): [{"question": f"{i} + 1?", "answer": "#### 2"} for i in range(150)],
    ("HuggingFaceH4/MATH-500", None, "test"): [{"problem": f"${i}^2$?", "answer": "1"} for i in range(150)],
    ("openai/openai_humaneval", None, "test"): [{"prompt": f"def f{i}():"} for i in range(164)],
    ("google-research-datasets/mbpp", "sanitized", "test"): [{"prompt": f"Write f{i}."} for i in range(257)],
    ("HuggingFaceH4/mt_bench_prompts", None, "train"): [{"prompt": [f"One {i}.", "Two."]} for i in range(80)],
    ("tatsu-lab/alpaca", None, "train"): [
        {"instruction": f"Sort {i}.", "input": "2, 1" if i % 2 else "", "output": "1, 2"} for i in range(300)
    ],
    ("nvidia/SPEED-Bench", "qualitative", "test"): [
        *({"category": c, "turns": [f"{c} {i}?", "And?"]} for c in ("coding", "math") for i in range(3)),
        {"category": "stem", "turns": [f"{NOT_THERE} USING SPECDEC_BENCH"]},
    ],
    ("RedHatAI/speculator_benchmarks", None, "train"): [{"prompt": f"Who is {i}?"} for i in range(4)],
}
"""Rows of the Hub's datasets by repository, configuration and split, as far as we know: it was not asked."""


def test_the_hub_gives_the_published_prompts(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, data_files: HUB[path, name, split])
    prompts = [asdict(prompt) for prompt in read_sets([*PAPER, "speed_bench", "redhat"])]
    counts = Counter(prompt["set"] for prompt in prompts)
    redhat = {f"redhat/{name}": 4 for name in REDHAT_SUBSETS}
    paper = {name: SETS[name].num_prompts for name in PAPER}
    assert counts == {**paper, "speed_bench/coding": 3, "speed_bench/math": 3, **redhat}
    assert (
        "1 of the 7 rows of speed_bench have their text in other datasets and are left out" in capsys.readouterr().err
    )
    texts = {prompt["set"]: prompt["turns"][0][0]["content"] for prompt in prompts}
    assert texts["gsm8k"].endswith("+ 1?" + MATH_SUFFIX) and texts["math500"].endswith("^2$?" + MATH_SUFFIX)
    assert texts["mbpp"].startswith("Write f") and texts["humaneval"].endswith("():\n```")
    assert "\n\nInput:\n2, 1" in "".join(prompt["turns"][0][0]["content"] for prompt in prompts)
    two_turns = ("mt_bench", "speed_bench/coding", "speed_bench/math")
    assert all(len(prompt["turns"]) == 1 + (prompt["set"] in two_turns) for prompt in prompts)
    assert len(set(map(json.dumps, prompts))) == len(prompts)


def test_a_folder_and_what_goes_wrong(tmp_path, monkeypatch):
    rows = [{"id": f"mine/{i}", "turns": ["a", "b"], "reference": 1} for i in range(5)]
    write_rows(tmp_path / "mine.jsonl", rows)
    prompts = read_sets(["mine"], tmp_path)
    assert {prompt.set for prompt in prompts} == {"mine"} and len(prompts[0].turns) == 2
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in read_sets(["mine"], tmp_path)]
    assert sorted(prompt.id for prompt in prompts) == [f"mine/{i}" for i in range(5)]
    with pytest.raises(ValueError, match="choose from gsm8k"):
        read_sets(["mine"])
    with pytest.raises(ValueError, match=r"cannot read .*gsm8k.jsonl"):
        read_sets(["gsm8k"], tmp_path)

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(ValueError, match="--bench.sets-dir"):
        read_sets(["gsm8k"])


def test_prompts_with_tools_are_a_set_of_their_own(tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}], "tools": [tool]}]
    write_rows(tmp_path / "mine.jsonl", rows)
    assert {prompt.set for prompt in read_sets(["mine"], tmp_path)} == {"mine", "mine (tools)"}


def test_files_as_their_authors_write_them(tmp_path):
    """Those of NVIDIA's script, which writes `messages`, and of Red Hat's repository."""
    users = [{"role": "user", "content": text} for text in ("Translate.", "Again.")]
    row = {"question_id": "1", "category": "mixed", "messages": users}
    write_rows(tmp_path / "throughput_8k.jsonl", [row])
    write_prompts(tmp_path / "rag.jsonl", ["Read."])
    first, second = read_sets(["speed_bench_8k", "redhat"], tmp_path)
    assert first.set == "speed_bench_8k/mixed" and [turn[0]["content"] for turn in first.turns] == [
        "Translate.",
        "Again.",
    ]
    assert second.set == "redhat/rag" and second.turns == [[{"role": "user", "content": "Read."}]]
    row["messages"][0]["content"] = f"{NOT_THERE} USING SPECDEC_BENCH"
    write_rows(tmp_path / "throughput_8k.jsonl", [row])
    with pytest.raises(ValueError, match="1 of the 1 rows of speed_bench_8k have their text in other datasets"):
        read_sets(["speed_bench_8k"], tmp_path)
