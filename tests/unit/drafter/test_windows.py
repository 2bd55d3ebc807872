"""Drafters of every layout: a block is the same in training and in all ways of decoding."""

from unittest.mock import Mock

import dflash.model
import pytest
import torch
from torch import nn

from dpace.blocks import build_blocks
from dpace.decode.generation import make_continuation
from dpace.decode.loop import Speculation
from dpace.decode.pace import Plan
from dpace.decode.steps import State, draft_step
from dpace.drafter import load_drafter
from dpace.drafter.views import blocks_hidden, draft_block
from dpace.drafter.vocabulary import PackedRows
from dpace.fast.cache import RaggedCache, TextCache
from tests.support.models import MASK, make_drafter, make_target, make_with_convolutions

WINDOW = 9
LAYOUTS = {
    "dflash": {},
    "convolutions": {},
    "windows": {"sliding_window": WINDOW},
    "windows, causal": {"sliding_window": WINDOW, "causal": True},
    "causal": {"causal": True},
    "mixed": {"sliding_window": WINDOW, "full_layers": (1,)},
    "mixed, causal": {"sliding_window": WINDOW, "full_layers": (0,), "causal": True},
}


@pytest.fixture(scope="module")
def target():
    return make_target("qwen3")


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_block_is_the_same_in_training_in_decoding_and_in_dflash(layout, target, tmp_path):
    """Behind texts shorter and longer than the window, also padded, and with caches of one text and of several."""
    has_convolutions = layout == "convolutions"  # which dflash 0.1.0 does not have
    make = make_with_convolutions if has_convolutions else make_drafter
    make(target, **LAYOUTS[layout]).save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path, target)
    theirs = dflash.model.DFlashDraftModel(drafter.config).eval()
    theirs.load_state_dict(drafter.state_dict(), strict=not has_convolutions)
    token_ids = torch.randint(4, 64, (1, 80))
    features = target.features(token_ids, drafter.target_layer_ids)
    anchors = [2, 3, 7, 11, 12, 40, 43, 78]
    blocks = build_blocks(token_ids, token_ids > 0, [torch.tensor(anchors)], drafter.block_size)
    inputs = {"token_ids": token_ids, "features": features, **vars(blocks)}
    trained = blocks_hidden(drafter, target, inputs)[0][0]
    caches = [
        TextCache(drafter.config, 80 + drafter.block_size, drafter.block_size),
        RaggedCache(drafter.config, 90, drafter.dtype, drafter.block_size, drafter.reaches),
    ]
    seen = 0
    for expected, anchor in zip(trained, anchors, strict=True):
        block = torch.full((1, drafter.block_size), MASK)
        block[0, 0] = token_ids[0, anchor]
        positions = torch.arange(anchor + drafter.block_size)[None]
        found = [draft_block(drafter, target, block, features[:, :anchor]).hidden[0]]
        padded = nn.functional.pad(features[:, :anchor], (0, 0, 3, 0), value=1.0)
        options = {"position_ids": nn.functional.pad(positions, (3, 0))}
        options["attention_mask"] = nn.functional.pad(torch.ones_like(positions), (3, 0))
        found.append(draft_block(drafter, target, block, padded, **options).hidden[0])
        if not has_convolutions:
            found += theirs(positions, noise_embedding=target.embed(block), target_hidden=features[:, :anchor])
        for cache in caches:
            options = {"position_ids": positions[:, seen:], "cache": cache}
            options["attention_mask"] = cache.place_block(positions[:, seen:anchor], torch.tensor([[anchor]]))
            found.append(draft_block(drafter, target, block, features[:, seen:anchor], **options).hidden[0])
            cache.crop(-drafter.block_size)
        seen = anchor
        for hidden in found:
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rejected_tokens_do_not_push_accepted_ones_out(target):
    """Where slot 0 predicts, a block verifies one token more than the smallest window sees."""
    drafter = make_drafter(target, sliding_window=5)
    drafter.config.dflash_config["sample_from_anchor"] = True
    features = torch.randn(1, drafter.block_size, 2 * target.hidden_size)
    positions = torch.arange(15, 20)[None]
    ends = [torch.tensor([[value]]) for value in (7, 16, 99)]
    scores = []
    for count in (1, drafter.block_size):
        cache = RaggedCache(drafter.config, 30, drafter.dtype, drafter.num_slots, drafter.reaches)
        cache.end = 30
        state = State(*ends, features[:, :count], positions[:, :count])
        scores.append(draft_step(drafter, PackedRows(target, None), cache, state, drafter.block_size)[1].scores)
    torch.testing.assert_close(*scores)


def test_the_pace_counts_what_a_window_reads(target):
    drafter = make_drafter(target, sliding_window=WINDOW)
    text = make_continuation(target, torch.randint(4, 64, (70,)), max_new_tokens=9)
    speculation = Speculation(target, drafter, text, width="full")
    pace = Mock(**{"plan.return_value": Plan(is_drafted=True), "choose_width.return_value": Plan(True, width=2)})
    speculation.pace = pace
    next(steps := speculation.steps())
    step = next(steps)
    assert pace.plan.call_args.args[1] == WINDOW - 1
    assert pace.learn.call_args.args == (Plan(True, width=2), step.token_ids, step.accepted) and step.width == 2
    assert 0 < pace.learn.call_args.kwargs["seconds"] < 60
