import re
from collections import Counter
from unittest import mock

import datasets
import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from dpace.prompts.public_sets import MATH_SUFFIX, NOT_THERE, REDHAT_SUBSETS, SETS, read_sets
from tests.support.files import write_prompts, write_rows

HUB = {
    ("openai/gsm8k", "main", "test"): [{"question": f"{i} + 1?"} for i in range(150)],
    ("HuggingFaceH4/MATH-500", None, "test"): [{"problem": f"${i}^2$?"} for i in range(150)],
    ("openai/openai_humaneval", None, "test"): [{"prompt": f"def f{i}():"} for i in range(164)],
    ("google-research-datasets/mbpp", "sanitized", "test"): [{"prompt": f"Write f{i}."} for i in range(257)],
    ("HuggingFaceH4/mt_bench_prompts", None, "train"): [{"prompt": [f"One {i}.", "Two."]} for i in range(80)],
    ("tatsu-lab/alpaca", None, "train"): [
        {"instruction": f"Sort {i}.", "input": "2, 1" if i % 2 else ""} for i in range(300)
    ],
    ("nvidia/SPEED-Bench", "qualitative", "test"): [
        *({"category": c, "turns": [f"{c} {i}?", "And?"]} for c in ("coding", "math") for i in range(3)),
        {"category": "stem", "turns": [f"{NOT_THERE} USING SPECDEC_BENCH"]},
    ],
    ("RedHatAI/speculator_benchmarks", None, "train"): [{"prompt": f"Who is {i}?"} for i in range(4)],
}
"""Rows of the Hub's datasets by repository, configuration and split, as far as we know: it was not asked."""


@pytest.fixture(autouse=True)
def hub(monkeypatch) -> mock.Mock:
    """It answers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = mock.Mock()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", asked)
    return asked


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_silent_hub_is_asked_once(is_silent, hub, monkeypatch):
    """Its cache is read then; libraries would ask it for minutes."""
    refusal = HfHubHTTPError("no such set", response=mock.Mock())
    hub.side_effect = httpx.ReadTimeout("silent") if is_silent else refusal

    def load(*_, **__):
        assert is_silent == huggingface_hub.constants.HF_HUB_OFFLINE
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="does not give the dataset openai/gsm8k .ConnectionError: offline"):
        read_sets(["gsm8k"])
    hub.assert_called_once_with("openai/gsm8k", timeout=10)


def test_the_hub_gives_the_published_prompts(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, data_files: HUB[path, name, split])
    paper = ["gsm8k", "math500", "humaneval", "mbpp", "mt_bench", "alpaca"]
    prompts = read_sets([*paper, "speed_bench", "redhat"])
    numbers = {name: SETS[name].num_prompts for name in paper}
    numbers |= {f"redhat/{name}": 4 for name in REDHAT_SUBSETS}
    assert Counter(prompt.set for prompt in prompts) == {**numbers, "speed_bench/coding": 3, "speed_bench/math": 3}
    (said,) = re.findall("[^;\n]* have their text in other datasets", capsys.readouterr().err)
    assert said.endswith("1 of the 7 rows of speed_bench have their text in other datasets")
    texts = {prompt.set: prompt.turns[0][0]["content"] for prompt in prompts}
    assert texts["gsm8k"].endswith("+ 1?" + MATH_SUFFIX) and texts["math500"].endswith("^2$?" + MATH_SUFFIX)
    assert texts["mbpp"].startswith("Write f") and texts["humaneval"].endswith("():\n```")
    assert any(prompt.turns[0][0]["content"].endswith("\n\nInput:\n2, 1") for prompt in prompts)
    two_turns = {prompt.set for prompt in prompts if len(prompt.turns) == 2}
    assert two_turns == {"mt_bench", "speed_bench/coding", "speed_bench/math"}
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len(read_sets(["gsm8k"], is_whole=True)) == 150


def test_a_folder_and_what_goes_wrong(tmp_path, monkeypatch):
    rows = [{"id": f"mine/{i}", "turns": ["a", "b"]} for i in range(5)]
    write_rows(tmp_path / "mine.jsonl", [*rows, {"id": "6", "prompt": "a"}])
    prompts = read_sets(["mine"], tmp_path)
    assert {prompt.set for prompt in prompts} == {"mine"} and {len(prompt.turns) for prompt in prompts} == {1, 2}
    assert prompts == read_sets(["mine"], tmp_path) and prompts[0].id != "mine/0"
    assert sorted(prompt.id for prompt in prompts) == [*(f"mine/{i}" for i in range(5)), "mine/6"]
    with pytest.raises(ValueError, match="choose from gsm8k"):
        read_sets(["mine"])
    with pytest.raises(ValueError, match=r"cannot read .*gsm8k.jsonl"):
        read_sets(["gsm8k"], tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "1 + 1?"}])
    with pytest.raises(ValueError, match="row 0 of openai/gsm8k has no text .*KeyError"):
        read_sets(["gsm8k"])
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=ConnectionError("no route")))
    with pytest.raises(ValueError, match="--bench.sets-dir"):
        read_sets(["gsm8k"])


def test_files_as_their_authors_write_them(tmp_path, capsys):
    """Those of NVIDIA's script, which writes `messages`, and of Red Hat's repository."""
    texts = ["Translate.", "Again."]
    row = {"category": "mixed", "messages": [{"role": "user", "content": text} for text in texts]}
    write_rows(tmp_path / "throughput_8k.jsonl", [row])
    write_prompts(tmp_path / "rag.jsonl", ["Read."])
    first, second = read_sets(["speed_bench_8k", "redhat"], tmp_path)
    assert first.set == "speed_bench_8k/mixed" and [turn[0]["content"] for turn in first.turns] == texts
    assert second.set == "redhat/rag" and second.turns[0][0]["content"] == "Read."
    assert not capsys.readouterr().err, "every text is there"
    row["messages"][0]["content"] = f"{NOT_THERE} USING SPECDEC_BENCH"
    write_rows(tmp_path / "throughput_8k.jsonl", [row])
    with pytest.raises(ValueError, match="1 of the 1 rows of speed_bench_8k have their text in other datasets"):
        read_sets(["speed_bench_8k"], tmp_path)
