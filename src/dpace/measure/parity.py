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

    The future of a block is all text behind its anchor, and the features at the anchor: the target has not read it when
    the block is drafted.

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
    generator = torch.Generator().manual_seed(0)
    for row in ResponseDataset(responses, max_length=10**9, num_anchors=None, seed=0):
        text = row["token_ids"]
        features = target.features(text[None], drafter.target_layer_ids)[0].cpu()
        other_text = torch.randint(target.config.vocab_size, text.shape, generator=generator)
        other_features = torch.randn(features.shape, generator=generator) * features.std() * 3
        number = len(row["anchors"]) // 2
        anchor = int(row["anchors"][number])
        hidden = _block_hidden(drafter, target, row, number, text, features)
        positions = torch.arange(len(text))
        for errors_of, of_text, of_features in (
            (leaks, positions > anchor, positions >= anchor),
            (controls, positions < anchor, positions < anchor),
        ):
            changed = torch.where(of_text, other_text, text)
            changed_features = torch.where(of_features[:, None], other_features, features)
            found = _block_hidden(drafter, target, row, number, changed, changed_features)
            errors_of.append(_relative_error(found, hidden))
        blocks = text.new_full((1, drafter.num_slots), drafter.mask_token_id)
        blocks[0, 0] = text[anchor]
        before = features[None, :anchor].to(target.device)
        errors.append(_relative_error(draft_block(drafter, target, blocks.to(target.device), before).hidden[0], hidden))
    cases = f"a block in {count(len(errors), 'response')}"
    leak = max(leaks, default=0.0)
    control = min(controls, default=0.0)
    error = max(errors, default=0.0)
    return [
        Finding(
            "no leak from the future",
            cases,
            leak < min(MAX_RELATIVE_ERROR, control / 10),
            f"other tokens and features after the anchor change the block by {leak:.1g}, before it by {control:.1g} or "
            "more (relative)",
        ),
        Finding(
            "a block in training is the block when serving",
            cases,
            bool(errors) and error < MAX_RELATIVE_ERROR,
            f"hidden states differ by {error:.1g} (relative)",
        ),
    ]


def _block_hidden(
    drafter: Drafter, target: Target, row: dict[str, Any], number: int, token_ids: Tensor, features: Tensor
) -> Tensor:
    """Compute the final hidden states of one block, "slot hidden", of a row with another text and its features."""
    inputs = collate([row | {"token_ids": token_ids, "features": features}], drafter.block_size)
    inputs = {name: value.to(target.device) for name, value in inputs.items()}
    return blocks_hidden(drafter, target, inputs).hidden[0, number, 1 - drafter.first_slot :]


def _relative_error(hidden: Tensor, expected: Tensor) -> float:
    """Compute the norm of the difference over the norm."""
    return float((hidden - expected).norm() / expected.norm())
