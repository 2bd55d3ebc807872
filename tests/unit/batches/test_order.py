"""Conversations of a step are about equally long, and which they are depends on seed and epoch only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert order.tolist() == grouped_order(np.array(lengths, int), step_size, seed=seed).tolist()


def padding(lengths, order, size):
    steps = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - lengths.sum() / sum(step.max() * len(step) for step in steps)


@pytest.mark.parametrize("size", [2, 8])
def test_at_most_a_twentieth_is_padding(size):
    """Half of it, for 8 lengths of a chat, where the order is random."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(6, 0.9, 4000)).astype(int) + 20, 3072)
    orders = [grouped_order(lengths, size, seed=(42, epoch)) for epoch in range(3)]
    assert all(padding(lengths, order, size) < 0.05 for order in orders)
    assert padding(lengths, rng.permutation(4000), 8) > 0.4
    firsts = [frozenset(order[:size].tolist()) for order in orders]
    steps = [set(map(frozenset, order.reshape(-1, size).tolist())) for order in orders]
    assert firsts[0] not in steps[1] | steps[2], "steps are others in other epochs"
    assert len(steps[0] & steps[1]) < len(steps[0]) / 20
