"""Measure the accepted lengths that decoding would have on known responses, without decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpace.blocks import Blocks
from dpace.data.dataset import ResponseDataset, collate
from dpace.drafter import Drafter
from dpace.loss import HeadOutput, frozen_head_nll
from dpace.metrics import Acceptance
from dpace.target import Target
from dpace.views import blocks_hidden


def walk(accepted_from: dict[int, int], span: Sequence[int], block_size: int) -> Acceptance:
    """Follow greedy decoding through a known response: each verification starts where the last one ended.

    Args:
        accepted_from: for each anchor of the response, the draft tokens that agree with the text before the first that
            does not.
        span: [start, end) of the response; its first token comes from the prefill.
        block_size: slots of a block.

    Returns:
        The accepted lengths of `dpace.decode.generate` on this text.
    """
    start, end = span
    accepted_lengths, without_bonus, anchor = [], 0, start
    while anchor < end - 1:
        accepted = min(accepted_from[anchor], end - 1 - anchor)
        without_bonus += anchor + accepted == end - 1
        accepted_lengths.append(accepted)
        anchor += accepted + 1
    return Acceptance.from_lengths(accepted_lengths, block_size, without_bonus)


@torch.no_grad()
def score_conversation(
    drafter: Drafter, target: Target, dataset: ResponseDataset, index: int
) -> tuple[Tensor, Blocks, HeadOutput]:
    """Draft the blocks of one conversation at once, and compare the drafts with its text.

    Returns:
        Final hidden states, "1 block slot hidden"; the blocks; and what the head gives for them.
    """
    inputs: dict[str, Any] = collate([dataset[index]], drafter.block_size)
    inputs = {name: value if value is None else value.to(target.device) for name, value in inputs.items()}
    hidden, blocks, _ = blocks_hidden(
        drafter, target, inputs, mask_token_id=drafter.mask_token_id, target_layer_ids=drafter.target_layer_ids
    )
    return hidden, blocks, frozen_head_nll(hidden, target.head, blocks.labels, blocks.is_scored)


@torch.no_grad()
def heldout_acceptance(drafter: Drafter, target: Target, dataset: ResponseDataset) -> Acceptance:
    """Measure accepted lengths on responses that the target wrote greedily, without decoding.

    They equal what `dpace.decode.generate` accepts at temperature 0. Each conversation is a row of the result.

    Memory: one conversation at a time, O(block tokens x (context + block tokens)) bytes for the dense mask, where block
    tokens are response tokens x block_size.

    Args:
        drafter: what is measured.
        target: its target.
        dataset: made with `num_anchors=None`, so that every response token is an anchor.

    Raises:
        ValueError: no response of two tokens or more.
    """
    was_training = drafter.training
    drafter.eval()
    results = []
    for i in range(len(dataset)):
        _, blocks, out = score_conversation(drafter, target, dataset, i)
        accepted_from = dict(zip(blocks.anchors[0].tolist(), out.accepted_lengths[0].tolist(), strict=True))
        spans = _spans(dataset.rows[i][2].tolist())
        results.append(Acceptance.pooled([walk(accepted_from, span, drafter.block_size) for span in spans]))
    drafter.train(was_training)
    return Acceptance.of_prompts(results)


def _spans(is_response: Sequence[bool]) -> list[tuple[int, int]]:
    """Find the runs [start, end) of response tokens that are long enough to be drafted for."""
    edges = [i for i, (a, b) in enumerate(zip([False, *is_response], [*is_response, False], strict=True)) if a != b]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end - start > 1]
