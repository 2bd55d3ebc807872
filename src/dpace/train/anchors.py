"""Choose the blocks of a training step: train on short blocks first, and on more of them."""

from typing import Any

from dpace.blocks import sample_anchors

LEAST_SLOTS = 4
"""Slots of the shortest blocks. Not tuned: other values were not compared."""


def block_size_at(progress: float, block_size: int) -> int:
    """Choose the size of the blocks at a point of a training whose blocks grow.

    The sizes are `block_size` and its halves, as long as they have `LEAST_SLOTS`: 4, 8 and 16 for 16. Each is trained
    for an equal part of the steps, the shortest first. Blocks of half the size are twice as many, so a step has as many
    slots at any time.

    Args:
        progress: share of the steps that are done, from 0 to below 1.
        block_size: slots of the drafter's blocks.
    """
    sizes = [block_size]
    while sizes[0] // 2 >= LEAST_SLOTS:
        sizes.insert(0, sizes[0] // 2)
    return sizes[min(int(progress * len(sizes)), len(sizes) - 1)]


def redraw(row: dict[str, Any], num_anchors: int) -> dict[str, Any]:
    """Draw the anchors of a conversation anew, for blocks of another size.

    Each conversation's draw has a seed of its own, so a resumed run draws the same anchors.

    Args:
        row: of `dpace.batches.dataset.ResponseDataset`.
        num_anchors: most blocks of a conversation.
    """
    return row | {"anchors": sample_anchors(row["is_response"], num_anchors=num_anchors, seed=("growing", row["draw"]))}
