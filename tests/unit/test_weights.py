import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpace.weights import (
    bv_weights,
    dflash_gamma,
    dflash_weights,
    dpace_confidence_only_weights,
    dpace_continuation_only_weights,
    dpace_exact_weights,
    dpace_weights,
    medusa_weights,
    spec_auf_weights,
    uniform_weights,
    vat_weights,
)

Q = [0.9, 0.5, 0.2, 0.7]


def block(values, dtype=torch.float64):
    """One block with an anchor in front."""
    return torch.tensor([[[0.0, *values]]], dtype=dtype)


def scored(flags):
    return torch.tensor([[[False, *map(bool, flags)]]])


def straight_from_the_formula(q, mask, alpha):
    """`w[j] = sum over m >= j of product over i <= m`, written as loops over the slots that count."""
    slots = [k for k in range(len(q)) if mask[k]]
    smoothed = {k: (1 - alpha) * q[k] + alpha for k in slots}
    weights = [0.0] * len(q)
    for j in slots:
        for m in (m for m in slots if m >= j):
            weights[j] += math.prod(smoothed[i] for i in slots if i <= m)
    return weights


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        dpace_weights(block(Q), scored([1] * 4), alpha)


@pytest.mark.parametrize(
    ("alpha", "mask", "expected"),
    [
        (0.5, "1111", [2.453375, 1.503375, 0.790875, 0.363375]),
        (0.5, "1101", [2.268125, 1.318125, 0.0, 0.605625]),
        (0.0, "1111", [1.503, 0.603, 0.153, 0.063]),
        (1.0, "1111", [4, 3, 2, 1]),
    ],
)
def test_published_vectors(alpha, mask, expected):
    flags = [int(c) for c in mask]
    weights = dpace_weights(block(Q), scored(flags), alpha)[0, 0, 1:]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=weights.dtype), rtol=0, atol=1e-6)


def test_the_weights_of_a_walk_are_those_of_the_drafter_with_other_probabilities():
    """At slot 3 the target's token is no candidate: the walk cannot take it, and the smoothing alone goes on."""
    weights = dpace_weights(block([0.9, 0.5, 0.0, 0.7]), scored([1] * 4), 0.5)[0, 0, 1:]
    expected = torch.tensor([2.3215625, 1.3715625, 0.6590625, 0.3028125])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "alpha", "weigh", "expected"),
    [
        ("1111", 0.5, dpace_weights, 2.703020),
        ("1111", 0.5, dpace_confidence_only_weights, 1.411601),
        ("1111", 0.5, dpace_continuation_only_weights, 5.068769),
        ("1101", 0.5, dpace_weights, 1.368637),
        ("1101", 0.5, dpace_confidence_only_weights, 0.809971),
        ("1101", 0.5, dpace_continuation_only_weights, 1.890545),
    ],
)
def test_published_losses_and_ablations(mask, alpha, weigh, expected):
    weights = weigh(block(Q), scored([int(c) for c in mask]), alpha)[0, 0, 1:]
    assert float((weights * -torch.tensor(Q).log()).sum()) == pytest.approx(expected, abs=1e-5)


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=15)


@given(probabilities, st.integers(0, 2**15 - 1), st.floats(0, 1))
def test_equals_the_formula_for_any_mask(q, mask_bits, alpha):
    mask = [mask_bits >> k & 1 for k in range(len(q))]
    weights = dpace_weights(block(q), scored(mask), alpha)[0, 0, 1:].tolist()
    assert weights == pytest.approx(straight_from_the_formula(q, mask, alpha), rel=1e-4, abs=1e-5)


def test_fp32_and_detached_from_bf16_input():
    probs = block(Q, torch.bfloat16).requires_grad_()
    weights = dpace_weights(probs, scored([1, 1, 1, 1]))
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights, dpace_weights(probs.float(), scored([1, 1, 1, 1])))


def test_schedules():
    flags = scored([1, 1, 0, 1])
    torch.testing.assert_close(
        dflash_weights(flags, gamma=4.0)[0, 0], torch.tensor([0, 1, math.exp(-1 / 4), 0, math.exp(-3 / 4)])
    )
    torch.testing.assert_close(medusa_weights(flags)[0, 0], torch.tensor([0, 0.8, 0.64, 0, 0.8**4]))
    torch.testing.assert_close(uniform_weights(flags)[0, 0], torch.tensor([0.0, 1, 1, 0, 1]))
    assert [dflash_gamma(size) for size in (16, 10, 8)] == [7, 5, 4]


@given(probabilities, st.integers(0, 2**15 - 1), st.floats(0, 0.99))
def test_exact_weights_are_the_gradient_of_the_smoothed_surrogate(q, mask_bits, alpha):
    """By autograd, with respect to log q, for any mask."""
    q = [0.01 + 0.99 * x for x in q]
    mask = scored([mask_bits >> k & 1 for k in range(len(q))])[0, 0, 1:]
    log_q = torch.tensor(q, dtype=torch.float64).log().requires_grad_()
    products = torch.where(mask, (1 - alpha) * log_q.exp() + alpha, 1.0).cumprod(0)
    (products * mask).sum().backward()
    weights = dpace_exact_weights(block(q), scored(mask.tolist()), alpha)[0, 0, 1:]
    torch.testing.assert_close(weights.double(), log_q.grad * mask, rtol=1e-4, atol=1e-5)


@given(probabilities, st.integers(0, 2**15 - 1))
def test_bv_weights_are_the_gradient_of_the_logarithm_of_the_expected_length(q, mask_bits):
    """By autograd, with respect to log q, at alpha 0; all 0 where no slot is scored."""
    q = [0.01 + 0.99 * x for x in q]
    mask = scored([mask_bits >> k & 1 for k in range(len(q))])[0, 0, 1:]
    log_q = torch.tensor(q, dtype=torch.float64).log().requires_grad_()
    length = (torch.where(mask, log_q.exp(), 1.0).cumprod(0) * mask).sum()
    (expected,) = torch.autograd.grad(length.clamp_min(1e-30).log(), log_q)
    weights = bv_weights(block(q), scored(mask.tolist()), 0.0)[0, 0, 1:]
    torch.testing.assert_close(weights.double(), expected * mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, [1, 0.401198, 0.101796, 0.041916]), (1.0, [1, 0.75, 0.5, 0.25])])
def test_bv_goes_from_a_linear_decay_to_the_logarithm(alpha, expected):
    assert bv_weights(block(Q), scored([1] * 4), alpha)[0, 0, 1:].tolist() == pytest.approx(expected, abs=1e-6)


def test_exact_weights_of_impossible_tokens_are_zero():
    """Also at alpha 0, where the smoothed probability is 0 too."""
    for alpha in (0.0, 0.5):
        assert not dpace_exact_weights(block([0.0, 0.0]), scored([1, 1]), alpha).any()


# scored: slots 1 2 4 5 6; slot 3 is a gap; the first scored miss is slot 4
_SCORED = torch.tensor([[[False, True, True, False, True, True, True]]])
_MATCH = torch.tensor([[[False, True, True, False, False, True, False]]])


def test_vat_and_spec_auf_by_hand():
    e = math.exp
    assert vat_weights(_MATCH, _SCORED, gamma=2.0)[0, 0].tolist() == pytest.approx([0, 1, 1, 0, 1, e(-0.5), e(-1)])
    assert spec_auf_weights(_MATCH, _SCORED)[0, 0].tolist() == [0, 1, 1, 0, 1, 0, 0]
