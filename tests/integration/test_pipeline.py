"""Recipe -> respond -> train -> bench -> generate, through the command line, on the tiny target."""

import re
from pathlib import Path

import pytest
import yaml

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.measure.benchmark import bench
from dpace.measure.results import read_log, read_results
from dpace.report.plots import acceptance_by_slot, slot_weights, training_curves
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


def test_every_verb(recipe, tmp_path, capsys, language_folder, language_prompts):
    out = tmp_path / "out"
    for verb, bar in (("respond", "answering prompts"), ("train", "training, dpace"), ("bench", "decoding")):
        assert main([verb, str(recipe)]) == 0
        printed = capsys.readouterr()
        assert "next: dpace" in printed.out and bar in printed.err and "{'loss'" not in printed.out
    assert "the target's code: packed weights, grouped heads, fused layers\n" in printed.err
    results = read_results(out / "results.json")
    greedy, paced, sampled, _ = results.rows
    assert (greedy.temperature, sampled.temperature) == (0.0, 1.0)
    assert (greedy.width, paced.width) == ("full", "auto")
    assert all(row.num_same_text == row.num_responses == 6 for row in results.rows)
    assert greedy.tau > 1.5 and greedy.tau_interval[0] <= greedy.tau <= greedy.tau_interval[1]
    assert sum(greedy.histogram) == sum(len(r.accepted_lengths) for r in greedy.responses)
    logs = {"drafter": [read_log(out / "drafter")]}
    drawings = [acceptance_by_slot(results.whole_blocks), training_curves(logs), slot_weights(logs)]
    assert all(drawing.startswith("<svg") and "line2d" in drawing for drawing in drawings)
    assert results.num_same_text == results.num_responses == 24

    assert main(["bench", str(recipe), "--bench.num-prompts", "1"]) == 0  # too few to call anything faster
    assert f"next: dpace generate --target {language_folder} --drafter {out}/drafter" in capsys.readouterr().out
    flags = ["--target", str(language_folder), "--prompt", language_prompts[0], "--max-new-tokens", "20"]
    texts = []
    for extra in ([], ["--drafter", str(out / "drafter")]):
        assert main(["generate", *flags, *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


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


def test_order_of_commands_is_told(recipe, capsys):
    assert main(["train", str(recipe)]) == 1
    assert "dpace respond" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_told(recipe, tmp_path, capsys, language_drafter):
    folder = tmp_path / "drafter"
    language_drafter.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert main(["bench", str(recipe), "--bench.drafters", str(folder)]) == 1
    assert "damaged" in capsys.readouterr().err


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
