"""One recipe, several objectives and seeds, on the tiny target."""

from dataclasses import fields, replace

import pytest
import torch

from dpace.config import BenchConfig, CompareConfig, PromptsConfig, Recipe
from dpace.measure.results import read_results
from dpace.report.sections import comparison
from dpace.report.tables import console, section_table
from dpace.studies.compare import compare
from tests.conftest import LANGUAGE_RECIPE
from tests.support.files import write_prompts

OWN = "examples.objective:weigh+kl"


@pytest.fixture
def config(language_prompts, tmp_path) -> CompareConfig:
    path = write_prompts(tmp_path / "prompts.jsonl", language_prompts)
    recipe = {field.name: getattr(LANGUAGE_RECIPE, field.name) for field in fields(Recipe)}
    return CompareConfig(
        **{
            **recipe,
            "output": str(tmp_path / "out"),
            "prompts": PromptsConfig(path=path),
            "train": replace(LANGUAGE_RECIPE.train, max_steps=2, eval_steps=2, logging_steps=2, num_anchors=4),
            "bench": BenchConfig(temperatures=(0.0,), max_new_tokens=12, num_prompts=2),
            "objectives": (OWN,),
            "seeds": (0, 1),
        }
    )


@pytest.fixture
def one_cell(config) -> CompareConfig:
    """The baseline alone, which is not decoded with."""
    return replace(config, objectives=("dflash",), seeds=(0,), bench=replace(config.bench, num_prompts=0))


def test_compare(config, language_target, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    results = compare(language_target, config)
    names = {OWN, "dflash"}
    assert read_results(tmp_path / "out" / "results.json") == results
    assert {row.drafter for row in results.rows} == names
    assert [row.tau for row in results.rows] == sorted((row.tau for row in results.rows), reverse=True)
    for row in results.rows:
        assert len(row.tau_by_seed) == 2 and row.num_prompts == 6 and row.step_seconds > 0
        if row.drafter == "dflash":
            assert row.gain == (0, 0, 0)
    console().print(section_table(comparison(results)))
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "over dflash [95 %]" in comparison(results).rows[0]
    for name in ("training.svg", "acceptance.svg", "weights.svg", "results.json", "decode/results.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100

    greedy = {row.drafter: row for row in results.decode.rows}
    assert set(greedy) == names and all(row.num_same_text == 2 for row in greedy.values())


@pytest.mark.wide
def test_fewer_steps_than_logging_steps_and_drawn_answers(one_cell, language_target):
    """The last step is logged too, so each row has its seconds; the temperature is that of the answers."""
    train, respond = replace(one_cell.train, logging_steps=100), replace(one_cell.respond, temperature=0.5)
    config = replace(one_cell, train=train, respond=respond)
    results = compare(language_target, config)
    assert [row.drafter for row in results.rows] == ["dflash"] and results.rows[0].step_seconds > 0
    assert results.rows[0].temperature == 0.5 and "at temperature 0.5" in comparison(results).text
    assert compare(language_target, config) == results


def test_a_cell_of_another_run_is_refused_before_any_work(one_cell, language_target, tmp_path, monkeypatch):
    compare(language_target, one_cell)
    monkeypatch.setattr("dpace.studies.compare.answer_prompts", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="train.max_steps 2, not 3"):
        compare(language_target, replace(one_cell, train=replace(one_cell.train, max_steps=3)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("mine")
    with pytest.raises(ValueError, match="results.json was not written by dpace"):
        compare(language_target, replace(one_cell, output=str(tmp_path / "other")))
    for names, fault in (
        (("dflash+overlap",), "has no confidence"),
        (("dflash+nll",), "under another name too; name it once"),
    ):
        with pytest.raises(ValueError, match=fault):
            compare(language_target, replace(one_cell, objectives=names))


@pytest.mark.wide
def test_same_batches_and_a_finished_cell_is_kept(config, language_target, tmp_path, monkeypatch):
    """All objectives see the same blocks from the same weights; a cell that was cut off goes on alone."""
    from dpace.train.loop import TrainingLoop

    config = replace(config, objectives=("uniform",), bench=replace(config.bench, num_prompts=0))
    take_step, seen = TrainingLoop.take_step, []

    def watched(self, batches):
        first = next(self.drafter.parameters()).detach().clone() if not self.state.global_step else None
        seen.append((batches[0]["anchors"], batches[0]["labels"], first))
        take_step(self, batches)

    monkeypatch.setattr(TrainingLoop, "take_step", watched)
    whole = compare(language_target, config)
    steps = config.train.max_steps
    assert len(seen) == 4 * steps  # 2 objectives, 2 seeds
    for seed in range(2):
        ours, theirs = (seen[start : start + steps] for start in (2 * seed * steps, (2 * seed + 1) * steps))
        for (anchors, labels, first), (other_anchors, other_labels, other_first) in zip(ours, theirs, strict=True):
            assert torch.equal(anchors, other_anchors) and torch.equal(labels, other_labels)
            assert first is None or torch.equal(first, other_first)
    assert not torch.equal(seen[0][1], seen[2 * steps][1])

    cell = tmp_path / "out" / "uniform" / "seed-1"
    for name in ("provenance.json", "heldout.json"):
        (cell / name).unlink()
    seen.clear()
    again = compare(language_target, config)
    assert len(seen) == 0  # its checkpoint of the last step was there
    assert [row.histogram for row in again.rows] == [row.histogram for row in whole.rows]
    with pytest.raises(ValueError, match="train.learning_rate 0.005, not 0.0001"):
        compare(language_target, replace(config, train=replace(config.train, learning_rate=1e-4)))
