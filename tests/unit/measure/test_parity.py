"""Blocks that see their future, or another block when serving than in training, are found; right ones pass."""

from dataclasses import replace

import pytest
import torch

import dpace.blocks
from dpace.blocks import Blocks
from dpace.measure.check import check_views

LEAK, VIEWS = "no leak from the future", "a block in training is the block when serving"


def shifted_visibility(shift: int):
    """Blocks that see so many tokens more of the text than those before their anchor."""
    right = dpace.blocks.visibility

    def visibility(blocks, num_context, reach):
        return right(replace(blocks, anchors=blocks.anchors + shift), num_context, reach)

    return dpace.blocks, "visibility", visibility


def next_positions(blocks):
    return blocks.anchors[..., None] + torch.arange(1, blocks.block_size + 1)


FAULTS = {
    "the anchor's features are seen": (shifted_visibility(1), {LEAK, VIEWS}),
    "slots hold the text": ((Blocks, "input_ids", lambda blocks, _: blocks.labels), {LEAK, VIEWS}),
    "the last token's features are hidden": (shifted_visibility(-1), {VIEWS}),
    "positions of slots are one too far": ((Blocks, "position_ids", property(next_positions)), {VIEWS}),
}
"""Faults of our own code; a block when serving has no future to see, so a leak shows in both checks."""


@pytest.mark.parametrize("fault", FAULTS)
def test_leaks_and_views_that_differ_are_named(
    fault, language_target, language_drafter, language_responses, monkeypatch
):
    def failed() -> set[str]:
        findings = check_views(language_target, language_drafter, language_responses[:2])
        return {finding.name for finding in findings if not finding.is_passed}

    assert not failed()
    change, expected = FAULTS[fault]
    monkeypatch.setattr(*change)
    assert failed() == expected
