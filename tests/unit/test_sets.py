import json
import sys
from types import SimpleNamespace

import pytest

from dpace.sets import SETS, read_sets

ROWS = {
    "gsm8k": {"question": "1 + 1?"},
    "math500": {"problem": "1 + 1?"},
    "humaneval": {"prompt": "def f():"},
    "mbpp": {"prompt": "Write f."},
    "mt_bench": {"prompt": ["One.", "Two."]},
    "alpaca": {"instruction": "Sort.", "input": "2, 1"},
}


def test_the_papers_six_in_their_formats(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        (known,) = (key for key, value in SETS.items() if value.path == path)
        return [ROWS[known]] * 200

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    prompts = read_sets(list(SETS))
    assert ("google-research-datasets/mbpp", "sanitized", "test") in asked
    counts = {name: sum(prompt.set == name for prompt in prompts) for name in SETS}
    assert counts == {"gsm8k": 128, "math500": 128, "humaneval": 164, "mbpp": 128, "mt_bench": 80, "alpaca": 128}
    texts = {prompt.set: [message["content"] for turn in prompt.turns for message in turn] for prompt in prompts}
    assert texts["gsm8k"] == ["1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."]
    assert texts["humaneval"][0].endswith("passes the tests:\n```python\ndef f():\n```")
    assert texts["mt_bench"] == ["One.", "Two."] and texts["alpaca"] == ["Sort.\n\nInput:\n2, 1"]
    assert len({prompt.id for prompt in prompts}) == len(prompts)


def test_a_folder_and_what_goes_wrong(tmp_path, monkeypatch):
    lines = [json.dumps({"id": f"mine/{i}", "turns": ["a", "b"], "reference": 1}) for i in range(5)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    prompts = read_sets(["mine"], tmp_path)
    assert {prompt.set for prompt in prompts} == {"mine"} and len(prompts[0].turns) == 2
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in read_sets(["mine"], tmp_path)]
    assert sorted(prompt.id for prompt in prompts) == [f"mine/{i}" for i in range(5)]
    with pytest.raises(ValueError, match="known are gsm8k"):
        read_sets(["mine"])
    with pytest.raises(ValueError, match=r"cannot read .*gsm8k.jsonl"):
        read_sets(["gsm8k"], tmp_path)

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(ValueError, match="--bench.sets-dir"):
        read_sets(["gsm8k"])
