"""What the training pass reads beside the blocks, place by place."""

import torch
from torch.testing import assert_close

from dpace.blocks import build_blocks
from dpace.drafter.views import blocks_hidden, draft_block
from tests.support.models import make_drafter, make_target


@torch.no_grad()
def test_what_predicts_a_slot_stands_at_the_token_before_it():
    """Of the target, its hidden state; of the drafter, its row before the anchor, or the first row of a text."""
    target = make_target("qwen3")
    drafter = make_drafter(target)
    token_ids = torch.randint(4, 64, (2, 9))
    anchors = [torch.tensor([0, 4, 7]), torch.tensor([3])]
    blocks = build_blocks(token_ids, token_ids > 0, anchors, drafter.block_size)
    inputs = {"token_ids": token_ids, "features": None, **vars(blocks)}
    found = blocks_hidden(drafter, target, inputs, with_target_hidden=True)
    logits = target.model(token_ids).logits
    for row, block, slot in blocks.is_scored.nonzero().tolist():
        place = int(anchors[row][block]) + slot - 1
        assert_close(target.head.logits(found.target_hidden[row, block, slot]), logits[row, place])
    rows = draft_block(drafter, target, token_ids, target.features(token_ids, drafter.target_layer_ids)).context
    assert_close(found.before[0], rows[0, [0, 3, 6]])
    assert_close(found.before[1, 0], rows[1, 2])
    drafter.config.dflash_config["sample_from_anchor"] = True  # its rows are one fewer, and move by one
    moved = blocks_hidden(drafter, target, inputs).hidden
    assert moved.shape == found.hidden.shape and not moved[:, :, 0].any() and moved[:, :, -1].any()
