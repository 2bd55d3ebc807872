"""A step is the same on any number of ranks and however it is accumulated."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dpace.config import LossConfig
from dpace.loss import REDUCTIONS
from dpace.measure.results import read_log
from dpace.train.loop import TrainingLoop
from dpace.train.run import train
from tests.conftest import make_recipe
from tests.support import ranks
from tests.support.files import read_json, write_rows
from tests.support.launch import on_ranks

RECIPE = make_recipe(max_steps=3, eval_steps=2, logging_steps=1, num_anchors=5, feature_cache_gib=0.0)


@pytest.fixture(scope="module")
def responses(language_responses):
    """Conversations with 5 anchors, and every third with a single one."""
    rows = language_responses[:14]
    return [
        replace(r, response_spans=[[start, start + 2] for start, _ in r.response_spans]) if i % 3 == 0 else r
        for i, r in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def on_one_rank(language_target, responses, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "one"
    write_prompts(responses, folder.parent)
    ranks.answer_all(language_target, responses, RECIPE, folder)
    ranks.train_all(language_target, responses, RECIPE, folder, 1)
    ranks.measure_all(language_target, responses, RECIPE, folder, 1)
    return folder


def write_prompts(responses, folder):
    folder.mkdir(exist_ok=True)
    rows = ({"id": one.id, "prompt": one.messages[0]["content"]} for one in responses)
    write_rows(folder / "prompts.jsonl", rows)


def without_seconds(path):
    """What a benchmark found out, apart from times and from what measured it."""

    def strip(value):
        if isinstance(value, dict):
            return {name: strip(one) for name, one in value.items() if name in COUNTED}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return strip(read_json(path))


COUNTED = {"rows", "decode", "responses", "id", "turn", "token_ids", "accepted_lengths"}
COUNTED |= {"set", "drafter", "width", "temperature", "tau", "histogram", "num_prompts", "num_same_text", "gain"}


def assert_same(one, other):
    """Loss, gradient norm and the weights after three steps; nothing that one has may be missing in the other."""
    first, second = (read_log(folder) for folder in (one, other))
    num_steps = 0
    for mine, reference in zip(second, first, strict=True):
        assert set(mine) == set(reference)
        if "loss" not in reference:
            continue
        num_steps += 1
        for key in ("loss", "grad_norm", "nll"):
            assert mine[key] == pytest.approx(reference[key], rel=1e-4), key
    assert num_steps == 3
    path = Path("checkpoints", "checkpoint-3", "model.safetensors")  # before they are rounded
    found, expected = (load_file(folder / path) for folder in (other, one))
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)


def two_steps(self, batches, take_step=TrainingLoop.take_step):
    if self.state.global_step == 2:
        raise KeyboardInterrupt
    take_step(self, batches)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_give_the_same_steps(
    num_ranks, on_one_rank, language_folder, language_target, responses, tmp_path
):
    """Uneven anchors, ranks and micro-batches without any, a last step with 3 of 8 conversations, every reduction."""
    write_prompts(responses, tmp_path)
    folder = tmp_path / "ranks"
    with mock.patch.object(TrainingLoop, "take_step", two_steps), pytest.raises(KeyboardInterrupt):
        ranks.train_all(language_target, responses, RECIPE, folder, 1)  # the first reduction; the ranks go on
    on_ranks(num_ranks, ranks.main, str(language_folder), responses, RECIPE, folder)
    for reduction in REDUCTIONS:
        assert_same(on_one_rank / reduction, folder / reduction)
    for path in folder.glob("answers-*/*.jsonl"):  # line by line in the same order
        assert path.read_bytes() == (on_one_rank / path.relative_to(folder)).read_bytes()
    assert len(list(folder.glob("answers-*/*.jsonl"))) == 2
    for name in ("bench", "compare"):
        assert without_seconds(folder / name / "results.json") == without_seconds(on_one_rank / name / "results.json")
    assert not list(folder.rglob("*.rank-*")) and len(list(folder.glob("features/*/*.safetensors"))) >= num_ranks


def test_reductions_differ(on_one_rank):
    assert len({read_log(on_one_rank / name)[0]["loss"] for name in REDUCTIONS}) == len(REDUCTIONS)


def test_a_heads_step_is_the_same_however_it_is_split(language_target, responses, tmp_path):
    base = replace(RECIPE, drafter=replace(RECIPE.drafter, head="lilicorr", head_candidates=4))
    empty = ranks.ResponseDataset([], max_length=8, num_anchors=None, seed=0)
    for size in (8, 2, 1):
        recipe = replace(base, train=replace(base.train, batch_size=size, gradient_accumulation_steps=8 // size))
        train(language_target, ranks.make_dataset(responses, recipe), empty, recipe, tmp_path / str(size))
    for size in (2, 1):
        assert_same(tmp_path / "8", tmp_path / str(size))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_gives_the_same_steps(reduction, size, on_one_rank, language_target, responses, tmp_path):
    """Micro-batches of 1, some without an anchor, and of 2."""
    config = replace(RECIPE.train, batch_size=size, gradient_accumulation_steps=8 // size)
    recipe = replace(RECIPE, train=config, loss=LossConfig(reduction=reduction))
    empty = ranks.ResponseDataset([], max_length=8, num_anchors=None, seed=0)
    train(language_target, ranks.make_dataset(responses, RECIPE), empty, recipe, tmp_path)
    assert_same(on_one_rank / reduction, tmp_path)
