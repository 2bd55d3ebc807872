"""Texts that begin alike are read as if each were read alone, with fewer tokens."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dpace.target.beginnings as beginnings
from dpace.decode.batch import generate_batch
from dpace.decode.loop import generate_plain
from dpace.fast.cache import RaggedCache
from dpace.target.beginnings import find_shared, read_texts
from tests.support.models import decode_whole, make_drafter, make_target


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(4, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SYSTEM, EXAMPLES = draw(70, 0), draw(40, 1)
TEXTS = [
    SYSTEM + draw(5, 2),
    *(SYSTEM + EXAMPLES + draw(count, 10 + count) for count in (3, 1, 9, 3, 20)),
    SYSTEM + draw(30, 3),
    SYSTEM + EXAMPLES,
]
"""A tree of two levels, one of whose texts is the beginning of others."""


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), max_size=12),
    least=st.integers(1, 4),
    saved=st.integers(1, 6),
)
def test_each_text_is_made_of_its_parts(texts, least, saved):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings, "MIN_SHARED", least)
        patch.setattr(beginnings, "MIN_SAVED_TOKENS", saved)
        order, shared = find_shared(texts)
    assert sorted(order) == list(range(len(texts)))
    starts = [0] * len(texts)
    for part in shared:
        assert part.end - part.start >= least and (len(part.rows) - 1) * (part.end - part.start) >= saved
        assert len({tuple(texts[row][: part.end]) for row in part.rows}) == 1
        for row in part.rows:
            assert starts[row] == part.start < part.end < len(texts[row])
            starts[row] = part.end


def test_texts_that_begin_alike_are_neighbours_and_short_ones_come_first():
    texts = [*TEXTS, *(draw(count, 50 + count) for count in (150, 8, 40))]
    order, shared = find_shared(texts)
    lengths = [len(texts[row]) for row in order]
    assert lengths[:2] == [8, 40] and lengths[-1] == 150
    assert [(part.start, part.end) for part in shared] == [(0, 70), (70, 109)]


def test_what_is_read_together_is_what_is_read_alone():
    target, num_read = make_target("smollm2", seed=1), []
    read = target.read
    target.read = lambda ids, *args, **options: num_read.append(ids.numel()) or read(ids, *args, **options)
    cache = RaggedCache(target.config, 200, torch.float32)
    hidden, features = read_texts(target, TEXTS, cache, [0, 2])
    del target.read
    assert sum(num_read) < sum(map(len, TEXTS)) / 2 and cache.end == 200
    for row, text in enumerate(TEXTS):
        own, outputs = target.read(torch.tensor([text]), layer_ids=[0, 2])
        torch.testing.assert_close(hidden[row], own[0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features[row, : len(text)], outputs[0], rtol=1e-4, atol=1e-4)
        assert not features[row, len(text) :].any()


def test_a_batch_that_begins_alike_keeps_each_text():
    """Also where attention reads what all rows share once, and rows leave the batch one after the other."""
    target = make_target("smollm2", seed=2)
    drafter = make_drafter(target, block_size=4)
    stops = [generate_plain(target, TEXTS[i], max_new_tokens=10).token_ids[-1 - 6 * (i == 0)] for i in (0, 1)]
    options = {"max_new_tokens": 12, "stop_token_ids": stops}
    expected = [(out.token_ids, out.accepted_lengths) for out in decode_whole(target, drafter, TEXTS, **options)]
    found = generate_batch(target, drafter, TEXTS, **options)
    assert [(out.token_ids, out.accepted_lengths) for out in found] == expected
    plain = generate_batch(target, None, TEXTS, **options)
    assert [out.token_ids for out in plain] == [token_ids for token_ids, _ in expected]
    assert len({len(out.token_ids) for out in found}) > 1, "some rows leave early"
