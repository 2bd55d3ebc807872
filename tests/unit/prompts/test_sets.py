import json
import sys
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import datasets
import pyarrow.parquet
import pytest

from dpace.prompts.public_sets import MATH_SUFFIX, NOT_THERE, REDHAT_SUBSETS, SETS, read_sets

PAPER = ["gsm8k", "math500", "humaneval", "mbpp", "mt_bench", "alpaca"]


REPOSITORIES = {
    "openai/gsm8k": (
        "main/test-00000-of-00001.parquet",
        [{"question": f"{i} + 1?", "answer": "#### 2"} for i in range(150)],
    ),
    "HuggingFaceH4/MATH-500": ("test.jsonl", [{"problem": f"${i}^2$?", "answer": "1", "level": 1} for i in range(150)]),
    "openai/openai_humaneval": (
        "openai_humaneval/test-00000-of-00001.parquet",
        [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():"} for i in range(164)],
    ),
    "google-research-datasets/mbpp": (
        "sanitized/test-00000-of-00001.parquet",
        [{"task_id": i, "prompt": f"Write f{i}.", "test_list": ["assert f"]} for i in range(257)],
    ),
    "HuggingFaceH4/mt_bench_prompts": (
        "data/train-00000-of-00001-8e06c55ea47f7aec.parquet",
        [{"category": "x", "prompt": [f"One {i}.", "Two."], "prompt_id": i} for i in range(80)],
    ),
    "tatsu-lab/alpaca": (
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        [{"instruction": f"Sort {i}.", "input": "2, 1" if i % 2 else "", "output": "1, 2"} for i in range(300)],
    ),
    "nvidia/SPEED-Bench": (
        "qualitative/test-00000-of-00001.parquet",
        [
            {"question_id": str(i), "category": c, "turns": [f"{c} {i}?", "And?"], "multiturn": True}
            for c in ("coding", "math")
            for i in range(3)
        ]
        + [{"question_id": "x", "category": "stem", "turns": [f"{NOT_THERE} USING SPECDEC_BENCH"], "multiturn": False}],
    ),
    "RedHatAI/speculator_benchmarks": ("qa.jsonl", [{"prompt": f"Who is {i}?"} for i in range(4)]),
}
"""Where the sets lie in their repositories on the Hub, and their columns.

This is as far as we know: the Hub was not asked for this test."""
CARDS = {
    "openai/gsm8k": ("main", "socratic"),
    "google-research-datasets/mbpp": ("full", "sanitized"),
    "openai/openai_humaneval": ("openai_humaneval",),
    "nvidia/SPEED-Bench": ("qualitative", "throughput_1k"),
}
"""Configurations that a repository's card names."""


def test_the_hub_gives_the_same(tmp_path, monkeypatch, capsys):
    """The library `datasets` finds each file by the name, configuration and split that are asked for.

    Here in folders, as it finds them in repositories of the Hub."""
    for name, (file, rows) in REPOSITORIES.items():
        path = tmp_path / "hub" / name / file
        path.parent.mkdir(parents=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            configs = CARDS.get(name, ())
            for other in {path.parents[1] / config for config in configs} - {path.parent}:
                other.mkdir()
                wrong = pyarrow.Table.from_pylist([{"question": "wrong", "prompt": "wrong", "turns": ["wrong"]}])
                pyarrow.parquet.write_table(wrong, other / path.name)
            if configs:
                lines = [f"- config_name: {c}\n  data_files:\n  - split: test\n    path: {c}/test-*\n" for c in configs]
                (path.parents[1] / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            for other in REDHAT_SUBSETS if name.startswith("RedHat") else ():
                (path.parent / f"{other}.jsonl").write_text(path.read_text())
    load_dataset = datasets.load_dataset

    def load(path, *args, **options):
        return load_dataset(str(tmp_path / "hub" / path), *args, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts = [asdict(prompt) for prompt in read_sets([*PAPER, "speed_bench", "redhat"])]
    counts = {name: sum(prompt["set"] == name for prompt in prompts) for name in PAPER}
    assert counts == {name: SETS[name].num_prompts for name in PAPER}
    others = Counter(prompt["set"] for prompt in prompts if prompt["set"] not in PAPER)
    redhat = {f"redhat/{name}": 4 for name in REDHAT_SUBSETS}
    assert others == {"speed_bench/coding": 3, "speed_bench/math": 3, **redhat}
    assert (
        "1 of the 7 rows of speed_bench have their text in other datasets and are left out" in capsys.readouterr().err
    )
    texts = {prompt["set"]: prompt["turns"][0][0]["content"] for prompt in prompts}
    assert texts["gsm8k"].endswith("+ 1?" + MATH_SUFFIX) and texts["math500"].endswith("^2$?" + MATH_SUFFIX)
    assert texts["mbpp"].startswith("Write f") and texts["humaneval"].endswith("():\n```")
    assert "\n\nInput:\n2, 1" in "".join(prompt["turns"][0][0]["content"] for prompt in prompts)
    two_turns = ("mt_bench", "speed_bench/coding", "speed_bench/math")
    assert all(len(prompt["turns"]) == 1 + (prompt["set"] in two_turns) for prompt in prompts)
    assert len(set(map(json.dumps, prompts))) == len(prompts) == 756 + 6 + 9 * 4


def test_a_folder_and_what_goes_wrong(tmp_path, monkeypatch):
    lines = [json.dumps({"id": f"mine/{i}", "turns": ["a", "b"], "reference": 1}) for i in range(5)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
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


def test_files_as_their_authors_write_them(tmp_path):
    """Those of NVIDIA's script, which writes `messages`, and of Red Hat's repository."""
    users = [{"role": "user", "content": text} for text in ("Translate.", "Again.")]
    row = {"question_id": "1", "category": "mixed", "messages": users}
    (tmp_path / "throughput_8k.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rag.jsonl").write_text(json.dumps({"prompt": "Read."}) + "\n")
    first, second = read_sets(["speed_bench_8k", "redhat"], tmp_path)
    assert first.set == "speed_bench_8k/mixed" and [turn[0]["content"] for turn in first.turns] == [
        "Translate.",
        "Again.",
    ]
    assert second.set == "redhat/rag" and second.turns == [[{"role": "user", "content": "Read."}]]
    row["messages"][0]["content"] = f"{NOT_THERE} USING SPECDEC_BENCH"
    (tmp_path / "throughput_8k.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="1 of the 1 rows of speed_bench_8k have their text in other datasets"):
        read_sets(["speed_bench_8k"], tmp_path)
