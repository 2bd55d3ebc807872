"""The forward pass of a training step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dpace.blocks import Blocks
from dpace.config import LossConfig
from dpace.drafter import Drafter
from dpace.head import Head
from dpace.loss import HeadOutput, Weigh, frozen_head_nll
from dpace.target import Target
from dpace.views import blocks_hidden


def score_batch(
    model: Any,
    target: Target,
    inputs: dict[str, Any],
    config: LossConfig,
    *,
    drafter: Drafter,
    head: Head,
    head_index: Tensor | None,
    weigh: Weigh,
    progress: float = 0.0,
    make_mask: Callable[[Blocks, int], Any] | None = None,
    chunk_bytes: int | None = None,
) -> tuple[HeadOutput, Blocks, Tensor]:
    """Run the forward pass of a micro-batch, up to the weighted loss of each block.

    Args:
        model: the drafter, or its wrapper in training.
        target: its target.
        inputs: a batch of `collate`.
        config: the loss.
        drafter: what `model` wraps.
        head: the target's, or its rows of the tokens that `head_index` knows.
        head_index: the row of each token in `head`; None where it has all.
        weigh: computes the weights.
        progress: share of the training that is done.
        make_mask: see `blocks_hidden`.
        chunk_bytes: see `frozen_head_nll`.

    Returns:
        What the head gives, the blocks, and the drafter's hidden states.
    """
    hidden, blocks, target_hidden = blocks_hidden(
        model,
        target,
        inputs,
        mask_token_id=drafter.mask_token_id,
        target_layer_ids=drafter.target_layer_ids,
        with_target_hidden=config.needs_target_probs,
        make_mask=make_mask,
    )
    labels = blocks.labels if head_index is None else head_index[blocks.labels]
    out = frozen_head_nll(
        hidden,
        head,
        labels,
        blocks.is_scored,
        weigh=lambda slots: weigh(
            slots._replace(anchors=blocks.anchors, is_response=inputs["is_response"], progress=progress)
        ),
        token_loss=config.token_loss,
        target_hidden=target_hidden,
        chunk_bytes=chunk_bytes,
    )
    return out, blocks, hidden
