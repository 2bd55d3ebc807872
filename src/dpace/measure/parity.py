"""Check that no block reads what it predicts, and that blocks are equal in training and serving.

In come a target in fp32, a drafter and some responses; out come findings for `dpace check`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpace.batches.dataset import ResponseDataset, collate
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden, draft_block
from dpace.respond.responses import Response
from dpace.system.progress import count
from dpace.target import Target

MAX_RELATIVE_ERROR = 1e-3
"""Largest relative difference, in fp32, between hidden states that are computed in two ways."""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    cases: str
    """What was examined, in words."""
    is_passed: bool
    detail: str


@torch.no_grad()
def check_views(target: Target, drafter: Drafter, responses: Sequence[Response]) -> list[Finding]:
    """Check that training's blocks do not see their future and are the blocks of decoding.

    Args:
        target: in fp32.
        drafter: of that target.
        responses: one block in the middle of each is examined.

    Returns:
        Two findings.
    """
    leaks = []
    controls = []
    errors = []
    for row in ResponseDataset(responses, max_length=10**9, num_anchors=None, seed=0):
        inputs: dict[str, Any] = collate([row], drafter.block_size)
        inputs["features"] = target.features(inputs["token_ids"], drafter.target_layer_ids)
        inputs = {name: value.to(target.device) for name, value in inputs.items()}
        number = len(row["anchors"]) // 2
        anchor = int(row["anchors"][number])
        hidden = _block_hidden(drafter, target, inputs, number)
        positions = torch.arange(inputs["token_ids"].shape[1], device=target.device)[None]
        other_future = _replace_text(inputs, positions > anchor, target, anchor)
        leaks.append(_relative_error(_block_hidden(drafter, target, other_future, number), hidden))
        other_past = _replace_text(inputs, positions < anchor, target, anchor)
        controls.append(_relative_error(_block_hidden(drafter, target, other_past, number), hidden))
        features = target.features(inputs["token_ids"][:, :anchor], drafter.target_layer_ids)
        blocks = inputs["token_ids"].new_full((1, drafter.num_slots), drafter.mask_token_id)
        blocks[0, 0] = inputs["token_ids"][0, anchor]
        errors.append(_relative_error(draft_block(drafter, target, blocks, features).hidden[0], hidden))
    largest_leak = max(leaks, default=0.0)
    largest_error = max(errors, default=0.0)
    return [
        Finding(
            "no leak from the future",
            f"a block in {count(len(leaks), 'response')}",
            bool(leaks) and largest_leak < min(MAX_RELATIVE_ERROR, min(controls) / 10),
            f"other tokens and features after the anchor change the block by {largest_leak:.1g}, before it by "
            f"{min(controls, default=0.0):.1g} or more (relative)",
        ),
        Finding(
            "a block in training is the block when serving",
            f"a block in {count(len(errors), 'response')}",
            bool(errors) and largest_error < MAX_RELATIVE_ERROR,
            f"hidden states differ by {largest_error:.1g} (relative)",
        ),
    ]


def _block_hidden(drafter: Drafter, target: Target, inputs: dict[str, Any], number: int) -> Tensor:
    """Compute the final hidden states of one block, "slot hidden"."""
    first = drafter.first_slot
    return blocks_hidden(drafter, target, inputs)[0][0, number, 1 - first :]


def _replace_text(inputs: dict[str, Any], where: Tensor, target: Target, anchor: int) -> dict[str, Any]:
    """Change the tokens and features of a batch in some places, and what no block may read.

    That is the labels, and the features at the anchor: the target has not read it when its block is drafted.
    """
    generator = torch.Generator().manual_seed(0)
    token_ids, features = inputs["token_ids"], inputs["features"]
    other_ids = torch.randint(target.config.vocab_size, token_ids.shape, generator=generator).to(token_ids.device)
    noise = torch.randn(features.shape, generator=generator).to(features) * features.std() * 3
    labels, is_unread = inputs["labels"].clone(), where.clone()
    is_unread[0, anchor] = True
    labels[..., 1:] = torch.randint(target.config.vocab_size, labels[..., 1:].shape, generator=generator)
    return inputs | {
        "token_ids": torch.where(where, other_ids, token_ids),
        "features": torch.where(is_unread[..., None], noise, features),
        "labels": labels,
    }


def _relative_error(hidden: Tensor, expected: Tensor) -> float:
    """Compute the norm of the difference over the norm."""
    return float((hidden - expected).norm() / expected.norm())
