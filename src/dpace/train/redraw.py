"""Draw the anchors of a batch where decoding with the drafter, as it is now, restarts.

Train on short blocks first, and on more of them.
"""

from typing import Any

import torch
from torch import Tensor

from dpace.blocks import build_blocks, draw_anchors, sample_anchors
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden
from dpace.loss import frozen_head_nll
from dpace.loss.restarts import restart_rates
from dpace.target import Target
from dpace.target.head import Head


@torch.no_grad()
def redraw(
    batch: dict[str, Any],
    drafter: Drafter,
    target: Target,
    head: Head,
    head_index: Tensor | None,
    *,
    share: float,
    with_head_input: bool = False,
) -> dict[str, Any]:
    """Draft the batch's blocks, estimate where verification restarts, and draw as many anchors anew.

    The estimate is from this batch and the drafter's weights alone, and each conversation's draw has a seed of its
    own. So nothing is kept from step to step, and a resumed run draws the same anchors.

    Args:
        batch: of `dpace.batches.dataset.collate`.
        drafter: as it is before the step.
        target: its target.
        head: the target's head, or the rows of it that the loss uses.
        head_index: where each token's row is in such a head.
        share: see `draw_anchors`.
        with_head_input: as in `Target.features`, for features that are computed here.

    Returns:
        The batch with other blocks, and with its features.
    """
    if batch["features"] is None:
        features = target.features(batch["token_ids"], drafter.target_layer_ids, with_head_input=with_head_input)
        batch = batch | {"features": features}
    names = {"mask_token_id": drafter.mask_token_id, "target_layer_ids": drafter.target_layer_ids}
    hidden, blocks, _ = blocks_hidden(drafter, target, batch, **names)
    labels = blocks.labels if head_index is None else head_index[blocks.labels]
    nll = frozen_head_nll(hidden, head, labels, blocks.is_scored).nll
    is_response = batch["is_response"]
    rates = restart_rates(torch.exp(-nll), blocks.is_scored, blocks.anchors, is_response).cpu()
    counts, draws = blocks.is_block.sum(-1).tolist(), batch["draw"].tolist()
    anchors = [
        draw_anchors(rate, of_row, num_anchors=count, share=share, seed=draw)
        for rate, of_row, count, draw in zip(rates, is_response.cpu(), counts, draws, strict=True)
    ]
    return batch | vars(build_blocks(batch["token_ids"], is_response, anchors, blocks.block_size))


LEAST_SLOTS = 4
"""Slots of the shortest blocks. Not tuned: other values were not compared."""


def block_size_at(progress: float, block_size: int) -> int:
    """Choose the size of the blocks at a point of a training whose blocks grow.

    The sizes are `block_size` and its halves, as long as they have `LEAST_SLOTS`: 4, 8 and 16 for 16. Each is trained
    for an equal part of the steps, the shortest first.

    Args:
        progress: share of the steps that are done, from 0 to below 1.
        block_size: slots of the drafter's blocks.
    """
    sizes = [block_size]
    while sizes[0] // 2 >= LEAST_SLOTS:
        sizes.insert(0, sizes[0] // 2)
    return sizes[min(int(progress * len(sizes)), len(sizes) - 1)]


def cut_blocks(batch: dict[str, Any], block_size: int, num_anchors: int) -> dict[str, Any]:
    """Draw the anchors of a batch anew, for blocks of another size.

    Each conversation's draw has a seed of its own, so a resumed run draws the same anchors.

    Args:
        batch: of `dpace.batches.dataset.collate`.
        block_size: slots of a block.
        num_anchors: most blocks of a conversation.
    """
    token_ids, is_response, draws = batch["token_ids"], batch["is_response"], batch["draw"].tolist()
    anchors = [
        sample_anchors(row, num_anchors=num_anchors, seed=("growing", draw))
        for row, draw in zip(is_response, draws, strict=True)
    ]
    return batch | vars(build_blocks(token_ids, is_response, anchors, block_size))
