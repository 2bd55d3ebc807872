"""Blocks that grow: as many slots a step, and anchors that depend on the draw only."""

import pytest
import torch

from dpace.batches.dataset import collate, redraw
from dpace.blocks import Blocks
from dpace.drafter.views import blocks_hidden
from dpace.training.run import check_recipe
from tests.support.models import VOCAB, make_recipe, make_target, make_with_convolutions

EIGHT = {"block_size": 8}


def test_an_objective_that_is_written_for_whole_blocks_is_refused():
    recipe = make_recipe(EIGHT, grow_blocks=True)
    with pytest.raises(ValueError, match=r"fails on a batch of shape \(2, 3, 2\)"):
        check_recipe(recipe, lambda slots: slots.is_scored * torch.ones(8))


@pytest.mark.parametrize(("is_causal", "parts"), [(False, (1, 1, 1)), (True, (4, 2, 1)), (True, (2, 0, 1))])
def test_training_takes_short_blocks_first(make_loop, is_causal, parts):
    """With 4 slots for 8, twice the blocks; where slots are causal, shorter blocks for longer."""
    drafter = {**EIGHT, "causal": is_causal}
    loop = make_loop(make_recipe(drafter, max_steps=sum(parts), num_anchors=4, grow_blocks=True))
    seen = [tuple(batches[0]["is_scored"].shape[1:]) for batches in loop.batches_of_steps()]
    sizes = [(16, 2), (8, 4), (4, 8)]
    assert seen == [size for size, count in zip(sizes, parts, strict=True) for _ in range(count)]


@torch.no_grad()
def test_short_blocks_do_not_see_each_other():
    """Several blocks of 2 slots at once give what each alone does, with a drafter whose blocks have 4."""
    target = make_target("qwen3")
    drafter = make_with_convolutions(target)
    token_ids, is_response = torch.randint(VOCAB, (20,)), torch.ones(20, dtype=torch.bool)
    row = {"token_ids": token_ids, "is_response": is_response, "features": None, "head_input": None, "draw": 5}
    cut = collate([redraw(row, 6)], 2)
    together = blocks_hidden(drafter, target, cut)[0]
    for block in range(6):
        alone = cut | {name: cut[name][:, [block]] for name in Blocks.__dataclass_fields__}
        torch.testing.assert_close(blocks_hidden(drafter, target, alone)[0][:, 0], together[:, block])
