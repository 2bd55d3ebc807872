"""One recipe, several objectives and seeds, on the tiny target."""

from dataclasses import replace

import pytest

from dpace.config import BenchConfig, CompareConfig, PromptsConfig
from dpace.measure.results import read_results
from dpace.studies.compare import compare, heldout_set
from dpace.training.loop import TrainingLoop
from tests.support.files import write_prompts
from tests.support.models import make_recipe

OWN = "examples.objective:weigh+kl"


@pytest.fixture
def config(language_prompts, tmp_path) -> CompareConfig:
    """Fewer steps than are logged: the last one is logged too."""
    options = {
        **vars(make_recipe(max_steps=2, eval_steps=2, logging_steps=100, num_anchors=4)),
        "output": str(tmp_path / "out"),
        "prompts": PromptsConfig(path=write_prompts(tmp_path / "prompts.jsonl", language_prompts)),
        "bench": BenchConfig(temperatures=(0.0,), widths=("full",), max_new_tokens=12, num_prompts=2),
    }
    return CompareConfig(**options, objectives=(OWN,), seeds=(0, 1))


def test_compare(config, language_target, tmp_path, monkeypatch):
    made = []

    def keep_set(*args):
        made.append(heldout_set(*args))
        return made[-1]

    monkeypatch.setattr("dpace.studies.compare.heldout_set", keep_set)
    results = compare(language_target, config)
    assert made[-1].features is not None, "hidden states that fit in memory are read once for all drafters"
    names = {OWN, "dflash"}
    assert read_results(tmp_path / "out" / "results.json") == results
    assert {row.drafter for row in results.rows} == names
    folders = {path.parts[-2] for path in (tmp_path / "out").glob("*/seed-0/")}
    assert folders == {"examples.objective-weigh+kl", "dflash"}, "not every disk takes a colon"
    assert [row.tau[0] for row in results.rows] == sorted((row.tau[0] for row in results.rows), reverse=True)
    for row in results.rows:
        assert len(row.tau_by_seed) == 2 and row.num_prompts == 6
        assert row.drafter == OWN or row.gain == (0, 0, 0)
    assert (tmp_path / "out" / "decode" / "results.json").stat().st_size > 100
    greedy = {row.drafter: row for row in results.decode.rows}
    assert set(greedy) == names and all(row.num_same_text == 2 for row in greedy.values())


def test_a_cell_of_another_run_is_refused_before_any_work(config, language_target, monkeypatch):
    """The baseline alone, which is not decoded with, on answers that the target draws."""
    respond, bench = replace(config.respond, temperature=0.5), replace(config.bench, num_prompts=0)
    one_cell = replace(config, objectives=("dflash",), seeds=(0,), bench=bench, respond=respond)
    (row,) = compare(language_target, one_cell).rows
    assert row.temperature == 0.5
    monkeypatch.setattr("dpace.studies.compare.answer_prompts", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="train.max_steps 2, not 3"):
        compare(language_target, replace(one_cell, train=replace(one_cell.train, max_steps=3)))
    for name, fault in (
        ("dflash+overlap", "has no confidence"),
        ("dflash+nll", "under another name too; name it once"),
    ):
        with pytest.raises(ValueError, match=fault):
            compare(language_target, replace(one_cell, objectives=(name,)))


@pytest.mark.wide
def test_all_objectives_see_the_same_blocks_from_the_same_weights(config, language_target, monkeypatch):
    config = replace(config, objectives=("uniform",), bench=replace(config.bench, num_prompts=0))
    take_step, seen = TrainingLoop.take_step, []

    def watched(self, batches):
        first = self.state.global_step == 0 and next(self.drafter.parameters()).tolist()
        seen.append((batches[0]["anchors"].tolist(), batches[0]["labels"].tolist(), first))
        take_step(self, batches)

    monkeypatch.setattr(TrainingLoop, "take_step", watched)
    compare(language_target, config)
    of_seed_0, same, of_seed_1, same_too = (seen[start : start + 2] for start in range(0, len(seen), 2))
    assert of_seed_0 == same != of_seed_1 == same_too
