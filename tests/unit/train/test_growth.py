"""Blocks that grow: as many slots a step, and anchors that depend on the draw only."""

import pytest
import torch

from dpace.batches.dataset import ResponseDataset, collate
from dpace.blocks import Blocks, sample_anchors
from dpace.drafter.views import blocks_hidden
from dpace.train.anchors import block_size_at, redraw
from tests.conftest import VOCAB, make_drafter, make_with_convolutions


@pytest.mark.parametrize(
    ("block_size", "sizes"),
    [(3, [3] * 6), (8, [4] * 3 + [8] * 3), (10, [5] * 3 + [10] * 3), (16, [4, 4, 8, 8, 16, 16])],
)
def test_sizes_are_halves_in_equal_parts(block_size, sizes):
    assert [block_size_at(step / 6, block_size) for step in range(6)] == sizes


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


@torch.no_grad()
@pytest.mark.parametrize("make", [make_drafter, make_with_convolutions])
def test_short_blocks_do_not_see_each_other(random_target, make):
    """Several blocks of 2 slots at once give what each alone does, with a drafter whose blocks have 4."""
    drafter = make(random_target)
    token_ids, is_response = torch.randint(VOCAB, (20,)), torch.ones(20, dtype=torch.bool)
    row = {"token_ids": token_ids, "is_response": is_response, "features": None, "draw": 5}
    cut = collate([redraw(row, 6)], 2)
    ids = {"mask_token_id": drafter.mask_token_id, "target_layer_ids": drafter.target_layer_ids}
    together = blocks_hidden(drafter, random_target, cut, **ids)[0]
    for block in range(6):
        alone = cut | {name: cut[name][:, [block]] for name in Blocks.__dataclass_fields__}
        torch.testing.assert_close(blocks_hidden(drafter, random_target, alone, **ids)[0][:, 0], together[:, block])
