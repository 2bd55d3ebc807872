from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.attention.flex_attention import flex_attention

from dpace.blocks import (
    Reach,
    block_sizes,
    build_blocks,
    build_target_layer_ids,
    dense_mask,
    flex_mask,
    sample_anchors,
    visible_tiles,
)
from tests.support.memory import peak_bytes

IS_RESPONSE = [False, False, True, True, True, False, True, False, True, True]


def test_published_layer_ids():
    assert build_target_layer_ids(32, 5) == [1, 8, 15, 22, 29]
    assert build_target_layer_ids(30, 1) == [15]
    with pytest.raises(ValueError, match="--drafter.num-features to 3"):
        build_target_layer_ids(6, 5)


def test_blocks_grow_from_halves():
    assert block_sizes(16, is_growing=True) == [2, 4, 8, 16]
    assert block_sizes(10, is_growing=True) == [2, 5, 10]
    assert block_sizes(16, is_growing=True, is_causal=True) == [2] * 8 + [4] * 4 + [8] * 2 + [16]
    assert block_sizes(10, is_growing=True, is_causal=True) == [2, 2, 2, 2, 5, 5, 10]
    assert block_sizes(16, is_growing=False) == [16]
    with pytest.raises(ValueError, match="--drafter.block-size is 3; take --train.no-grow-blocks"):
        block_sizes(3, is_growing=True)


def test_anchors_have_a_supervised_successor_and_a_fixed_seed():
    assert sample_anchors(IS_RESPONSE).tolist() == [2, 3, 8]
    draws = [sample_anchors([True] * 50, num_anchors=10, seed=(0, epoch, "a")).tolist() for epoch in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0])) and len(draws[0]) == 10
    assert sample_anchors([True, False]).tolist() == []


@pytest.fixture
def example():
    token_ids = torch.arange(10, 30).view(2, 10)
    is_response = torch.tensor([IS_RESPONSE, [False] * 4 + [True] * 6])
    return build_blocks(token_ids, is_response, [torch.tensor([2, 8]), torch.tensor([4, 5, 8])], block_size=4)


def test_blocks_by_hand(example):
    assert example.anchors.tolist() == [[2, 8, 0], [4, 5, 8]]
    assert example.labels[0, 0].tolist() == [12, 13, 14, 15]
    assert example.is_scored[0, 0].tolist() == [False, True, True, False]  # leaves the response
    assert example.labels[0, 1].tolist() == [18, 19, 0, 0]  # runs past the end
    assert example.is_scored[0, 1].tolist() == [False, True, False, False]
    nothing = [torch.zeros(0, dtype=torch.long)]
    assert build_blocks(torch.ones(1, 3).long(), torch.ones(1, 3).bool(), nothing, 2).is_block.tolist() == [[False]]
    assert not example.is_scored[0, 2].any() and not example.is_block[0, 2]
    assert example.position_ids[1, 2].tolist() == [8, 9, 10, 11]
    assert example.input_ids(99)[0, 0].tolist() == [12, 99, 99, 99]
    start = torch.arange(3)[None]
    assert build_blocks(start, start >= 0, [torch.tensor([0])], block_size=2).is_block.all()
    seen = dense_mask(example, num_context=10)[0, 0, 5].nonzero().flatten().tolist()
    assert seen == [*range(8), 14, 15, 16, 17]  # the context strictly before the anchor, and its own block


def test_dense_and_flex_are_one_rule(example):
    dense = dense_mask(example, num_context=10)
    q = torch.randn(2, 4, 12, 16)
    k, v = torch.randn(2, 2, 2, 22, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    with pytest.warns(UserWarning, match="without torch.compile"):
        found = flex_attention(q, k, v, block_mask=flex_mask(example, 10), enable_gqa=True)
    torch.testing.assert_close(found, expected)


TILE = 4
"""Small, so that anchors, windows and texts end everywhere in a tile."""


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 7),
    st.integers(3, 30),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.sampled_from([Reach(), Reach(9), Reach(10, is_causal=True)]),
    st.randoms(),
)
def test_tiles_are_those_of_the_dense_mask(block_size, num_context, counts, reach, draws):
    """Any anchors, block size and text: tiles with a visible pair are there, and those of the text know if all are."""
    places = range(num_context - 1)
    anchors = [torch.tensor(sorted(draws.sample(places, min(n, len(places)))), dtype=torch.long) for n in counts]
    ids = torch.zeros(len(counts), num_context, dtype=torch.long)
    blocks = build_blocks(ids, ids == 0, anchors, block_size)
    dense = dense_mask(blocks, num_context, reach)[:, 0]
    tiles = torch.nn.functional.pad(dense, (0, -dense.shape[2] % TILE, 0, -dense.shape[1] % TILE))
    tiles = tiles.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).transpose(2, 3).flatten(3)
    with mock.patch("dpace.blocks.MASK_TILE", TILE):
        is_seen, is_whole = visible_tiles(blocks, num_context, reach)
        listed = flex_mask(blocks, num_context, reach).to_dense()[:, 0].bool()
    assert torch.equal(is_seen, tiles.any(-1)) and torch.equal(is_seen, listed)
    in_text = num_context // TILE
    assert torch.equal(is_whole[..., :in_text], tiles.all(-1)[..., :in_text]) and not is_whole[..., in_text:].any()


def test_the_mask_of_a_long_text_takes_little_memory():
    """All anchors of the paper's longest text at once."""
    ids = torch.zeros(1, 3072, dtype=torch.long)
    blocks = build_blocks(ids, ids == 0, [torch.arange(3071)], 16)
    masks = []
    assert peak_bytes(lambda: masks.append(flex_mask(blocks, 3072))) < 100 * 2**20
    assert masks[0].full_kv_num_blocks.sum() > masks[0].kv_num_blocks.sum()  # most of what is seen needs no rule
