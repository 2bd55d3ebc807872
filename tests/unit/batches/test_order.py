"""Conversations of a step are about equally long, and which they are depends on seed and epoch only."""

import numpy as np
from hypothesis import given, settings, strategies as st

from dpace.batches.dataset import grouped_order


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 4000), max_size=60),
    step_size=st.integers(1, 9),
    seed=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_each_conversation_comes_once(lengths, step_size, seed):
    order = grouped_order(np.array(lengths, int), step_size, seed=seed)
    assert sorted(order.tolist()) == list(range(len(lengths)))


def test_at_most_a_twentieth_is_padding():
    """Half of it, for lengths of a chat, where the order is random; and steps are others in other epochs."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(6, 0.9, 4000)).astype(int) + 20, 3072)
    steps = [grouped_order(lengths, 8, seed=(42, epoch)).reshape(-1, 8) for epoch in range(2)]
    assert all(lengths.sum() > 0.95 * 8 * lengths[of_epoch].max(1).sum() for of_epoch in steps)
    assert np.mean(np.diff(lengths[steps[0]].mean(1)) < 0) > 0.4  # not the short ones first
    first, second = (set(map(frozenset, of_epoch.tolist())) for of_epoch in steps)
    assert len(first & second) < len(first) / 20
