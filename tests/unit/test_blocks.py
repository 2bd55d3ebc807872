import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention.flex_attention import create_mask, flex_attention

from dpace.blocks import (
    MASK_TILE,
    build_blocks,
    build_target_layer_ids,
    dense_mask,
    flex_mask,
    sample_anchors,
    visibility,
    visible_tiles,
)
from tests.support.memory import peak_bytes


@pytest.mark.parametrize(
    ("num_layers", "num_features", "expected"),
    [
        (36, 5, [1, 9, 17, 25, 33]),
        (36, 3, [1, 17, 33]),
        (32, 5, [1, 8, 15, 22, 29]),
        (32, 3, [1, 15, 29]),
        (30, 1, [15]),
    ],
)
def test_published_layer_ids(num_layers, num_features, expected):
    assert build_target_layer_ids(num_layers, num_features) == expected


def test_too_many_features_are_refused():
    with pytest.raises(ValueError, match="--drafter.num-features to 3"):
        build_target_layer_ids(6, 5)


IS_RESPONSE = [False, False, True, True, True, False, True, False, True, True]


def test_anchors_have_a_supervised_successor_and_a_fixed_seed():
    assert sample_anchors(IS_RESPONSE).tolist() == [2, 3, 8]
    draws = [sample_anchors([True] * 50, num_anchors=10, seed=(0, epoch, "a")).tolist() for epoch in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0])) and len(draws[0]) == 10
    assert sample_anchors([True, False]).tolist() == []


def example():
    token_ids = torch.arange(10, 30).view(2, 10)
    is_response = torch.tensor([IS_RESPONSE, [False] * 4 + [True] * 6])
    return build_blocks(token_ids, is_response, [torch.tensor([2, 8]), torch.tensor([4, 5, 8])], block_size=4)


def test_blocks_by_hand():
    blocks = example()
    assert blocks.anchors.tolist() == [[2, 8, 0], [4, 5, 8]]
    assert blocks.labels[0, 0].tolist() == [12, 13, 14, 15]
    assert blocks.is_scored[0, 0].tolist() == [False, True, True, False]  # leaves the response
    assert blocks.labels[0, 1].tolist() == [18, 19, 0, 0]  # runs past the end
    assert blocks.is_scored[0, 1].tolist() == [False, True, False, False]
    assert not blocks.is_scored[0, 2].any() and not blocks.is_block[0, 2]
    assert blocks.position_ids[1, 2].tolist() == [8, 9, 10, 11]
    assert blocks.input_ids(99)[0, 0].tolist() == [12, 99, 99, 99]


def test_who_sees_whom():
    mask = dense_mask(example(), num_context=10)[0, 0]
    first_block, second_block = mask[1], mask[5]
    assert first_block[:10].nonzero().flatten().tolist() == [0, 1]  # strictly before the anchor at 2
    assert first_block[10:].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert second_block[:10].sum() == 8 and second_block[10:].nonzero().flatten().tolist() == [4, 5, 6, 7]
    padding = mask[9]
    assert not padding[:10].any() and padding[10:].nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_dense_and_flex_are_one_rule():
    blocks = example()
    dense = dense_mask(blocks, num_context=10)
    assert torch.equal(create_mask(visibility(blocks, 10), 2, 1, 12, 22, device="cpu"), dense)
    q, k, v = torch.randn(2, 4, 12, 16), torch.randn(2, 2, 22, 16), torch.randn(2, 2, 22, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    with pytest.warns(UserWarning, match="without torch.compile"):
        found = flex_attention(q, k, v, block_mask=flex_mask(blocks, 10), enable_gqa=True)
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 200), st.integers(3, 700), st.lists(st.integers(0, 30), min_size=1, max_size=3), st.randoms())
def test_tiles_are_those_of_the_dense_mask(block_size, num_context, counts, random):
    """Any anchors, block size and text: every tile with a visible pair is there, and whole tiles are whole."""
    anchors = [torch.tensor(sorted(random.sample(range(num_context - 1), min(n, num_context - 1)))) for n in counts]
    ids = torch.zeros(len(counts), num_context, dtype=torch.long)
    blocks = build_blocks(ids, ids == 0, [a.long() for a in anchors], block_size)
    dense = dense_mask(blocks, num_context)[:, 0]
    tiles = functional.pad(dense, (0, -dense.shape[2] % MASK_TILE, 0, -dense.shape[1] % MASK_TILE))
    tiles = tiles.unflatten(1, (-1, MASK_TILE)).unflatten(3, (-1, MASK_TILE)).transpose(2, 3).flatten(3)
    is_seen, is_whole = visible_tiles(blocks, num_context)
    assert torch.equal(is_seen, tiles.any(-1))
    assert not (is_whole & ~tiles.all(-1)).any()
    mask = flex_mask(blocks, num_context)
    assert torch.equal(mask.to_dense()[:, 0].bool(), is_seen)


@pytest.mark.parametrize(("batch", "num_blocks", "mib"), [(2, 512, 20), (1, 3071, 100)])
def test_the_mask_of_a_long_text_takes_little_memory(batch, num_blocks, mib):
    """The paper's batch, and all anchors of its longest text at once."""
    ids = torch.zeros(batch, 3072, dtype=torch.long)
    anchors = [torch.arange(0, 3071)[-num_blocks:] for _ in range(batch)]
    blocks = build_blocks(ids, ids == 0, anchors, 16)
    assert peak_bytes(lambda: flex_mask(blocks, 3072)) < mib * 2**20
    mask = flex_mask(blocks, 3072)
    assert mask.full_kv_num_blocks.sum() > mask.kv_num_blocks.sum()  # most of what is seen needs no rule inside
