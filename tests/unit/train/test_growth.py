"""Blocks that grow: as many slots a step, and anchors that depend on the draw only."""

from dataclasses import replace

import pytest
import torch

from dpace.batches.dataset import ResponseDataset, collate, redraw
from dpace.blocks import Blocks, block_sizes, sample_anchors
from dpace.cli import main
from dpace.drafter.views import blocks_hidden
from dpace.train.loop import TrainingLoop
from dpace.train.run import make_datasets, train
from tests.conftest import VOCAB, make_drafter, make_recipe, make_with_convolutions


@pytest.mark.parametrize(
    ("block_size", "sizes"),
    [(8, [4, 8]), (10, [5, 10]), (16, [4, 8, 16])],
)
def test_sizes_are_halves(block_size, sizes):
    assert block_sizes(block_size, is_growing=True) == sizes
    assert block_sizes(block_size, is_growing=False) == [block_size]


@pytest.mark.parametrize(
    ("size", "message"), [(7, "--drafter.block-size is 7; leave it out"), (8, "fails on a batch of")]
)
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_what_cannot_grow_is_refused_before_any_work(verb, size, message, tmp_path, monkeypatch, capsys):
    """Blocks that are too short, and an objective that is written for blocks of 8 slots only."""
    (tmp_path / "eight.py").write_text("import torch\ndef weigh(slots): return slots.is_scored * torch.ones(8)\n")
    monkeypatch.chdir(tmp_path)
    objective = ["--loss.objective", "eight:weigh"] if verb == "train" else ["--objectives", "eight:weigh"]
    words = [verb, *objective, "--drafter.block-size", str(size), "--target", "none"]
    assert main([*words, "--train.grow-blocks"]) == 1
    assert message in capsys.readouterr().err
    assert main(words) == 1
    assert message not in capsys.readouterr().err


def test_short_blocks_are_more(language_responses):
    """With 4 slots for 8, twice the blocks, all within the responses; the next epoch's are others."""
    dataset = ResponseDataset(language_responses[:6], max_length=64, num_anchors=3, seed=0)
    rows = [dataset[i] for i in range(6)]
    whole, short = collate(rows, 8), collate([redraw(row, 6) for row in rows], 4)
    assert short["labels"].shape == (6, 6, 4) and whole["labels"].shape == (6, 3, 8)
    for row in rows:
        drawn = redraw(row, 6)["anchors"]
        assert torch.equal(drawn, redraw(row, 6)["anchors"])
        assert set(drawn.tolist()) <= set(sample_anchors(row["is_response"]).tolist())
    dataset.epoch = 1
    assert not torch.equal(short["anchors"], collate([redraw(dataset[i], 6) for i in range(6)], 4)["anchors"])


def test_training_takes_short_blocks_first(language_target, language_responses, tmp_path, monkeypatch):
    seen = []
    take_step = TrainingLoop.take_step

    def note_shape(loop, batches):
        seen.append(tuple(batches[0]["is_scored"].shape[1:]))
        take_step(loop, batches)

    monkeypatch.setattr(TrainingLoop, "take_step", note_shape)
    recipe = make_recipe(max_steps=4, num_anchors=4, grow_blocks=True)
    recipe = replace(recipe, drafter=replace(recipe.drafter, block_size=8))
    train(language_target, *make_datasets(language_target, language_responses[:21], [], recipe), recipe, tmp_path)
    assert seen == [(8, 4), (8, 4), (4, 8), (4, 8)]


@torch.no_grad()
@pytest.mark.parametrize("make", [make_drafter, make_with_convolutions])
def test_short_blocks_do_not_see_each_other(random_target, make):
    """Several blocks of 2 slots at once give what each alone does, with a drafter whose blocks have 4."""
    drafter = make(random_target)
    token_ids, is_response = torch.randint(VOCAB, (20,)), torch.ones(20, dtype=torch.bool)
    row = {"token_ids": token_ids, "is_response": is_response, "features": None, "draw": 5}
    cut = collate([redraw(row, 6)], 2)
    together = blocks_hidden(drafter, random_target, cut)[0]
    for block in range(6):
        alone = cut | {name: cut[name][:, [block]] for name in Blocks.__dataclass_fields__}
        torch.testing.assert_close(blocks_hidden(drafter, random_target, alone)[0][:, 0], together[:, block])
