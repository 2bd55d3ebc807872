"""An objective of one's own from recipe to drafter, and a benchmark that was interrupted."""

import re
from pathlib import Path

import pytest
import yaml

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.measure.benchmark import bench
from dpace.measure.results import read_log
from dpace.report.sections import verdict
from tests.support.files import make_prompts, write_prompts


@pytest.fixture
def recipe(language_folder, language_prompts, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(prompts, language_prompts)
    values = {
        "target": str(language_folder),
        "output": str(tmp_path / "out"),
        "prompts": {"path": str(prompts)},
        "respond": {"max_new_tokens": 32},
        "drafter": {"num_layers": 2, "num_features": 2, "block_size": 6},
        "train": {"learning_rate": 5e-3, "max_steps": 60, "batch_size": 8, "num_anchors": 12, "eval_steps": 30},
        "bench": {"max_new_tokens": 32, "temperatures": [0.0, 1.0]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_objective_of_the_page_is_the_example_and_trains(recipe, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "reference" / "api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (printed,) = (block for block in blocks if "def weigh" in block)
    assert printed in (root / "examples" / "objective.py").read_text()
    (tmp_path / "of_the_page.py").write_text(printed)
    monkeypatch.chdir(tmp_path)
    assert main(["respond", str(recipe)]) == main(["train", str(recipe), "--loss.objective", "of_the_page:weigh"]) == 0
    taus = [entry["eval_tau"] for entry in read_log(tmp_path / "out" / "drafter") if "eval_tau" in entry]
    assert max(taus) > 1.3


def test_an_interrupted_bench_goes_on(language_target, language_drafter, tmp_path):
    prompts = make_prompts(f"w{i} w51" for i in range(4))
    config = BenchConfig(max_new_tokens=12, temperatures=(0.0,))
    whole = bench(language_target, {"d": language_drafter}, prompts, config, tmp_path)
    (path,) = tmp_path.glob("bench-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:10])
    again = bench(language_target, {"d": language_drafter}, prompts, config, tmp_path)
    assert again.rows[0].histogram == whole.rows[0].histogram
    kept, fresh = (r.rows[0].responses[0].decode_seconds for r in (whole, again))
    assert kept == fresh


def test_verdict_is_honest():
    assert verdict((1.1, 1.3)) == "faster"
    assert verdict((0.7, 0.9)) == "slower"
    assert verdict((0.9, 1.1)) == "not clear"
    assert verdict((None, None)) == "too few prompts"
