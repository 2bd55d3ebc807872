"""Choose the blocks of a training step: train on short blocks first, and on more of them."""

from typing import Any

from dpace.blocks import build_blocks, sample_anchors
from dpace.config import TrainConfig

LEAST_SLOTS = 4
"""Slots of the shortest blocks. Not tuned: other values were not compared."""


def blocks_of_step(batch: dict[str, Any], progress: float, config: TrainConfig, block_size: int) -> dict[str, Any]:
    """Return a micro-batch with the blocks that it is trained on: those it has, or shorter ones while blocks grow.

    Blocks of half the size are twice as many, so a step has as many slots at any time.

    Args:
        batch: of `dpace.batches.dataset.collate`, with blocks of the full size.
        progress: share of the steps that are done, from 0 to below 1.
        config: the settings of the training.
        block_size: slots of the drafter's blocks.
    """
    num_slots = block_size_at(progress, block_size) if config.grow_blocks else block_size
    if num_slots == block_size:
        return batch
    return cut_blocks(batch, num_slots, config.num_anchors * block_size // num_slots)


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
    is_response = batch["is_response"]
    anchors = [
        sample_anchors(row, num_anchors=num_anchors, seed=("growing", draw))
        for row, draw in zip(is_response, batch["draw"].tolist(), strict=True)
    ]
    return batch | vars(build_blocks(batch["token_ids"], is_response, anchors, block_size))
