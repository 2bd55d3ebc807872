import math

import pytest
import torch
from hypothesis import given, strategies as st

from dpace.weights import (
    bv_weights,
    dflash_gamma,
    dflash_weights,
    dpace_confidence_only_weights,
    dpace_continuation_only_weights,
    dpace_weights,
    medusa_weights,
    spec_auf_weights,
    uniform_weights,
    vat_weights,
)

Q = [0.9, 0.5, 0.2, 0.7]
blocks = st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=15)
"""Probabilities of a block's draft slots, and which of them are scored."""


def block(probs):
    """One block, with an anchor in front."""
    return torch.tensor([[[0.0, *probs]]], dtype=torch.float64)


def scored(flags):
    return torch.tensor([[[False, *map(bool, flags)]]])


def published(mask):
    return block(Q), scored(map(int, mask))


@pytest.mark.parametrize(
    ("weigh", "alpha", "mask", "expected"),
    [
        (dpace_weights, 0.5, "1111", [2.453375, 1.503375, 0.790875, 0.363375]),
        (dpace_confidence_only_weights, 0.5, "1101", [0.95, 0.7125, 0, 0.605625]),
        (dpace_continuation_only_weights, 0.5, "1101", [2.3875, 1.85, 0, 1]),
        (bv_weights, 1.0, "1111", [1, 0.75, 0.5, 0.25]),
    ],
)
def test_published_vectors(weigh, alpha, mask, expected):
    assert weigh(*published(mask), alpha)[0, 0, 1:].tolist() == pytest.approx(expected, abs=1e-6)


@given(blocks, st.floats(0, 1))
def test_dpace_equals_loops_over_the_formula_for_any_mask(slots, alpha):
    """`w[j] = sum over m >= j of product over i <= m of q~[i]`, over the slots that count."""
    counted = [j for j, (_, is_scored) in enumerate(slots) if is_scored]
    expected = [0.0] * len(slots)
    for j in counted:
        for m in (m for m in counted if m >= j):
            expected[j] += math.prod((1 - alpha) * slots[i][0] + alpha for i in counted if i <= m)
    probs, flags = zip(*slots, strict=True)
    weights = dpace_weights(block(probs), scored(flags), alpha)[0, 0, 1:]
    assert weights.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def lengths(log_q, mask, alpha):
    """The expected accepted length, with smoothed probabilities."""
    return (torch.where(mask, (1 - alpha) * log_q.exp() + alpha, 1.0).cumprod(0) * mask).sum()


MAXIMIZED = {
    "dpace, times the factor that it leaves out": (
        lambda q, m: dpace_weights(q, m, 0.3) * 0.7 * q / (0.7 * q + 0.3),
        lambda log_q, m: lengths(log_q, m, 0.3),
    ),
    "bv": (lambda q, m: bv_weights(q, m, 0.0), lambda log_q, m: lengths(log_q, m, 0.0).clamp_min(1e-30).log()),
}


@pytest.mark.parametrize("name", MAXIMIZED)
@given(blocks)
def test_weights_are_the_gradient_of_what_is_maximized(name, slots):
    """By autograd, with respect to log q, for any mask."""
    weigh, maximized = MAXIMIZED[name]
    probs, flags = zip(*slots, strict=True)
    mask = scored(flags)
    log_q = torch.tensor(probs, dtype=torch.float64).log().requires_grad_()
    (expected,) = torch.autograd.grad(maximized(log_q, mask[0, 0, 1:]), log_q)
    torch.testing.assert_close(weigh(block(probs), mask)[0, 0, 1:].double(), expected, rtol=1e-4, atol=1e-5)


def test_fp32_and_detached():
    probs, flags = published("1111")
    weights = dpace_weights(probs.bfloat16().requires_grad_(), flags)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights, dpace_weights(probs.bfloat16().float(), flags))


def test_published_defaults():
    probs, flags = published("1101")
    for weigh in (dpace_weights, dpace_confidence_only_weights, dpace_continuation_only_weights, bv_weights):
        assert torch.equal(weigh(probs, flags), weigh(probs, flags, 0.5))
    assert torch.equal(dflash_weights(flags), dflash_weights(flags, 7.0))
    assert torch.equal(vat_weights(flags & False, flags), vat_weights(flags & False, flags, 7.0))


def test_schedules():
    e = math.exp
    flags = scored([1, 1, 0, 1])
    assert dflash_weights(flags, gamma=4.0)[0, 0].tolist() == pytest.approx([0, 1, e(-1 / 4), 0, e(-3 / 4)])
    assert medusa_weights(flags)[0, 0].tolist() == pytest.approx([0, 0.8, 0.64, 0, 0.8**4])
    assert uniform_weights(flags)[0, 0].tolist() == [0, 1, 1, 0, 1]
    assert [dflash_gamma(size) for size in (16, 10, 8, 4)] == [7, 5, 4, 2.5]


def test_vat_and_spec_auf_by_hand():
    """Slot 3 is a gap, and the first scored miss is slot 4."""
    flags = scored([1, 1, 0, 1, 1, 1])
    is_match = scored([1, 1, 0, 0, 1, 0])
    expected = [0, 1, 1, 0, 1, math.exp(-0.5), math.exp(-1)]
    assert vat_weights(is_match, flags, gamma=2.0)[0, 0].tolist() == pytest.approx(expected)
    assert spec_auf_weights(is_match, flags)[0, 0].tolist() == [0, 1, 1, 0, 1, 0, 0]
