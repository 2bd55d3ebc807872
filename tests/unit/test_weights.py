import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpace.blocks import build_blocks, sample_anchors
from dpace.loss.restarts import expected_passes, expected_passes_weights, passes_weights, restart_rates, survival
from dpace.weights import (
    chain_reward_weights,
    dflash_gamma,
    dflash_weights,
    dpace_confidence_only_weights,
    dpace_continuation_only_weights,
    dpace_exact_weights,
    dpace_weights,
    head_weights,
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


@pytest.mark.parametrize(
    ("mask", "alpha", "weigh", "expected"),
    [
        ("1111", 0.5, dpace_weights, 2.703020),
        ("1111", 0.5, dpace_confidence_only_weights, 1.411601),
        ("1111", 0.5, dpace_continuation_only_weights, 5.068769),
        ("1101", 0.5, dpace_weights, 1.368637),
        ("1101", 0.5, dpace_confidence_only_weights, 0.809971),
        ("1101", 0.5, dpace_continuation_only_weights, 1.890545),
        ("1111", 0.0, dpace_confidence_only_weights, 0.574061),
        ("1111", 0.0, dpace_continuation_only_weights, 4.197489),
        ("1111", 1.0, dpace_weights, 6.076434),
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


@given(probabilities, st.floats(0, 1))
def test_monotone_telescoping_and_mass(q, alpha):
    mask = [1] * len(q)
    weights = dpace_weights(block(q), scored(mask), alpha)[0, 0, 1:].double()
    products = dpace_confidence_only_weights(block(q), scored(mask), alpha)[0, 0, 1:].double()
    differences = weights - torch.cat([weights[1:], weights.new_zeros(1)])
    torch.testing.assert_close(differences, products, rtol=1e-4, atol=1e-5)
    assert (differences >= -1e-5).all()
    slots = torch.arange(1, len(q) + 1)
    torch.testing.assert_close(weights.sum(), (slots * products).sum(), rtol=1e-4, atol=1e-5)


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=15))
def test_is_the_gradient_of_the_surrogate(q):
    log_q = torch.tensor(q, dtype=torch.float64).log().requires_grad_()
    log_q.exp().cumprod(0).sum().backward()
    weights = dpace_weights(block(q), scored([1] * len(q)), alpha=0.0)[0, 0, 1:]
    torch.testing.assert_close(weights.double(), log_q.grad, rtol=1e-5, atol=1e-6)


def test_ablations_factor_the_weights():
    flags = scored([1, 1, 0, 1])
    product = dpace_confidence_only_weights(block(Q), flags) * dpace_continuation_only_weights(block(Q), flags)
    torch.testing.assert_close(product, dpace_weights(block(Q), flags))


def test_fp32_and_detached_from_bf16_input():
    probs = block(Q, torch.bfloat16).requires_grad_()
    weights = dpace_weights(probs, scored([1, 1, 1, 1]))
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights, dpace_weights(probs.float(), scored([1, 1, 1, 1])))


def test_blocks_that_cross_a_turn_or_the_end():
    """Slots of the user's turn in the middle of a block, and past the text, are factors of 1 and terms of 0."""
    is_response = torch.tensor([[False, True, True, False, False, True, True]])
    blocks = build_blocks(torch.arange(7)[None], is_response, [torch.tensor([1, 5])], block_size=6)
    assert blocks.is_scored[0].int().tolist() == [[0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0]]
    probs = torch.rand(1, 2, 6)
    weights = dpace_weights(probs, blocks.is_scored)
    for n in range(2):
        expected = straight_from_the_formula(probs[0, n].tolist(), blocks.is_scored[0, n].tolist(), 0.5)
        assert weights[0, n].tolist() == pytest.approx(expected)


def test_schedules():
    flags = scored([1, 1, 0, 1])
    torch.testing.assert_close(
        dflash_weights(flags, gamma=4.0)[0, 0], torch.tensor([0, 1, math.exp(-1 / 4), 0, math.exp(-3 / 4)])
    )
    torch.testing.assert_close(head_weights(flags)[0, 0], torch.tensor([0, 0.8, 0.64, 0, 0.8**4]))
    torch.testing.assert_close(uniform_weights(flags)[0, 0], torch.tensor([0.0, 1, 1, 0, 1]))
    assert [dflash_gamma(size) for size in (16, 10, 8)] == [7, 5, 4]


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        dpace_weights(block(Q), scored([1] * 4), alpha)


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


def test_exact_weights_of_impossible_tokens_are_zero():
    """Also at alpha 0, where the smoothed probability is 0 too."""
    for alpha in (0.0, 0.5):
        assert not dpace_exact_weights(block([0.0, 0.0]), scored([1, 1]), alpha).any()


def test_chain_reward_by_hand():
    # prefix products 0.5, 0.1; suffix sums 0.6, 0.1; over two scored slots
    weights = chain_reward_weights(block([0.5, 0.9, 0.2]), torch.tensor([[[False, True, False, True]]]), scale=2.0)
    torch.testing.assert_close(weights[0, 0], torch.tensor([0.0, 1 + 0.6, 0.0, 1 + 0.1]))
    with pytest.raises(ValueError, match="scale is -1"):
        chain_reward_weights(block([0.5]), scored([1]), scale=-1.0)


# scored: slots 1 2 4 5 6; slot 3 is a gap; the first scored miss is slot 4
_SCORED = torch.tensor([[[False, True, True, False, True, True, True]]])
_MATCH = torch.tensor([[[False, True, True, False, False, True, False]]])


def test_vat_and_spec_auf_by_hand():
    e = math.exp
    assert vat_weights(_MATCH, _SCORED, gamma=2.0)[0, 0].tolist() == pytest.approx([0, 1, 1, 0, 1, e(-0.5), e(-1)])
    assert spec_auf_weights(_MATCH, _SCORED)[0, 0].tolist() == [0, 1, 1, 0, 1, 0, 0]


def test_vat_and_spec_auf_where_all_or_none_match():
    everywhere = scored([1] * 4)
    none = torch.zeros_like(everywhere)
    assert torch.equal(vat_weights(everywhere, everywhere), uniform_weights(everywhere))
    assert torch.equal(spec_auf_weights(everywhere, everywhere), uniform_weights(everywhere))
    assert torch.equal(vat_weights(none, everywhere, gamma=3.0), dflash_weights(everywhere, gamma=3.0))
    assert spec_auf_weights(none, everywhere)[0, 0].tolist() == [0, 1, 0, 0, 0]


def loop_over_the_response(q, is_response, alpha):
    """The recurrences of N and v, and the weights, written as loops; `q[t]` are the probabilities of the block at t."""
    size, seq = len(q[0]), len(is_response)

    def starts(t):
        return t + 1 < seq and is_response[t] and is_response[t + 1]

    def reach(t, a):
        if a > size - 1 or not all(t + i < seq and is_response[t + i] for i in range(a + 1)):
            return 0.0
        return math.prod((1 - alpha) * q[t][i] + alpha for i in range(1, a + 1))

    to_go = [0.0] * (seq + size + 1)
    for t in reversed(range(seq)):
        if starts(t):
            to_go[t] = 1 + sum((reach(t, a) - reach(t, a + 1)) * to_go[t + a + 1] for a in range(size))
    visits = [0.0] * (seq + size + 1)
    for t in range(seq):
        visits[t] += starts(t) and not (t and is_response[t - 1])
        for a in range(size if starts(t) else 0):
            if t + a + 1 < seq and starts(t + a + 1):
                visits[t + a + 1] += visits[t] * (reach(t, a) - reach(t, a + 1))
    mean = sum(visits) / max(1, sum(map(starts, range(seq))))
    weights = [[0.0] * size for _ in range(seq)]
    for t in filter(starts, range(seq)):
        for k in range(1, size):
            terms = (reach(t, m) * max(0.0, to_go[t + m] - to_go[t + m + 1]) for m in range(k, size))
            is_reached = all(t + i < seq and is_response[t + i] for i in range(k + 1))
            weights[t][k] = is_reached * visits[t] / mean * sum(terms) / mean
    return to_go[:seq], visits[:seq], weights


def whole_text(is_response, size, seed=0):
    """Every anchor of one text, with random probabilities."""
    flags = torch.tensor([is_response])
    blocks = build_blocks(torch.zeros_like(flags).long(), flags, [sample_anchors(flags[0])], size)
    probs = torch.rand(blocks.labels.shape, generator=torch.Generator().manual_seed(seed))
    return probs, blocks, flags


@given(st.lists(st.booleans(), min_size=2, max_size=24), st.integers(2, 6), st.floats(0, 1), st.integers(0, 99))
def test_expected_passes_by_loops(is_response, size, alpha, seed):
    """Also for several responses in one text, whose blocks must not reach into each other."""
    probs, blocks, flags = whole_text(is_response, size, seed)
    weights = expected_passes_weights(probs, blocks.is_scored, blocks.anchors, flags, alpha)
    if not blocks.is_block.any():
        assert not weights.any()
        return
    q = {int(t): probs[0, n].tolist() for n, t in enumerate(blocks.anchors[0])}
    to_go, visits, expected = loop_over_the_response(
        [q.get(t, [0.0] * size) for t in range(len(flags[0]))], is_response, alpha
    )
    passes = expected_passes(survival(probs, blocks.is_scored, alpha), blocks.anchors, blocks.is_block, flags)
    assert passes.to_go[0].tolist() == pytest.approx(to_go, rel=1e-4, abs=1e-5)
    assert passes.visits[0].tolist() == pytest.approx(visits, rel=1e-4, abs=1e-5)
    for n, t in enumerate(blocks.anchors[0].tolist()):
        assert weights[0, n].tolist() == pytest.approx(expected[t], rel=1e-3, abs=1e-4)


def test_expected_passes_are_the_gradient_of_the_number_of_passes():
    """By autograd through the recurrence, where no saving is negative: up to one factor for the whole text."""
    probs, blocks, flags = whole_text([False] + [True] * 20, 4)
    probs = 0.5 + 0.3 * probs
    log_q = probs.double().log().requires_grad_()
    reach = log_q[0].exp().where(blocks.is_scored[0], 0.0)
    reach = torch.cat([torch.ones(len(reach), 1), reach[:, 1:].cumprod(-1), torch.zeros(len(reach), 1)], dim=1)
    to_go = [torch.zeros(())] * 30
    for n, t in reversed(list(enumerate(blocks.anchors[0].tolist()))):
        to_go[t] = 1 + sum(((reach[n, a] - reach[n, a + 1]) * to_go[t + a + 1] for a in range(4)), torch.zeros(()))
    assert all(a >= b for a, b in zip(to_go[1:], to_go[2:], strict=False))
    to_go[1].backward()
    weights = expected_passes_weights(probs, blocks.is_scored, blocks.anchors, flags, alpha=0.0)
    mean = float(to_go[1].detach()) / len(blocks.anchors[0])
    torch.testing.assert_close(weights.double() * mean**2, -log_q.grad, rtol=1e-4, atol=1e-5)


def test_constant_visits_and_savings_give_d_pace_back():
    flags = scored([1, 1, 1, 0])
    reach = survival(block(Q).float(), flags, 0.5)
    ones = torch.ones_like(reach)
    torch.testing.assert_close(passes_weights(reach, ones[..., 0], ones), dpace_weights(block(Q), flags, 0.5))
    # the same from a long text whose blocks are all alike, far from its ends
    _, blocks, is_response = whole_text([True] * 200, 5)
    probs = torch.tensor([0.0, *Q]).expand(blocks.labels.shape)
    weights = expected_passes_weights(probs, blocks.is_scored, blocks.anchors, is_response)
    torch.testing.assert_close(weights[0, 100], dpace_weights(block(Q), scored([1] * 4))[0, 0], rtol=0.02, atol=0)


def test_positions_between_anchors_take_the_nearest_ones_block():
    probs, blocks, flags = whole_text([True] * 12, 4)
    few = torch.tensor([[2, 8, 0]])
    is_block = torch.tensor([[True, True, False]])
    nearest = torch.tensor([[0] * 6 + [1] * 5])  # of 5 both are as near
    reach = survival(probs, blocks.is_scored)[:, [2, 8, 0]]
    ours = expected_passes(reach, few, is_block, flags)
    whole = expected_passes(reach[0, nearest], blocks.anchors, blocks.is_block, flags)
    for mine, reference in zip(ours, whole, strict=True):
        torch.testing.assert_close(mine, reference)


@given(st.lists(st.booleans(), min_size=2, max_size=20), st.integers(2, 5), st.integers(0, 99))
def test_restart_rates_by_loops(is_response, size, seed):
    probs, blocks, flags = whole_text(is_response, size, seed)
    chosen = torch.arange(0, blocks.labels.shape[1], 2)  # every other anchor
    anchors, is_scored = blocks.anchors[:, chosen], blocks.is_scored[:, chosen]
    rates = restart_rates(probs[:, chosen], is_scored, anchors, flags)[0].tolist()
    found: dict[int, list[float]] = {}
    for n, s in enumerate(anchors[0].tolist() if is_scored.any() else []):
        q = probs[0, 2 * n].tolist()
        for a in range(size):
            t = s + a + 1
            if all(i < len(is_response) and is_response[i] for i in range(s, t + 2)):
                stop = math.prod(q[1 : a + 1]) * (1 - q[a + 1] if a + 1 < size else 1)
                found.setdefault(t, []).append(stop)
    known = {t: sum(rates) / len(rates) for t, rates in found.items()}
    mean = sum(known.values()) / max(1, len(known))
    for t, rate in enumerate(rates):
        is_anchor = t + 1 < len(is_response) and is_response[t] and is_response[t + 1]
        first = is_anchor and not (t and is_response[t - 1])
        assert rate == pytest.approx(1 if first else is_anchor * known.get(t, mean), abs=1e-5)
