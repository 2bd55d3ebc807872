from typing import get_args

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from dpace.config import LossConfig, Reduction, TokenLoss
from dpace.loss import Slots, block_loss, frozen_head_nll, head_scores
from dpace.loss.head_scores import chunk_bytes_of
from dpace.loss.objective import make_weigh, with_objective
from dpace.target.head import LmHead
from dpace.weights import dflash_weights, dpace_weights, medusa_weights
from tests.support.losses import frozen_head_nll_reference

ALL = 2**22
"""Bytes that all logits of a test fit into."""
HEADS = {"plain": (1.0, None), "capped": (1.0, 5.0), "scaled": (0.25, None), "both": (0.5, 3.0)}


def problem(dtype=torch.float32, batch=3, blocks=5, slots=6, hidden=16, vocab=50, head="plain"):
    torch.manual_seed(1)
    states = torch.randn(batch, blocks, slots, hidden, dtype=dtype)
    labels = torch.randint(vocab, (batch, blocks, slots))
    is_scored = torch.rand(batch, blocks, slots) < 0.7
    is_scored[..., 0] = False
    is_scored[1:2] = False
    labels[~is_scored] = 10**6  # must never be looked up
    return states, LmHead(torch.randn(vocab, hidden, dtype=dtype), *HEADS[head]), labels, is_scored


def run(function, states, head, labels, is_scored, **options):
    states = states.clone().requires_grad_()
    out = function(states, head, labels, is_scored, **options)
    out.losses.sum().backward()
    return out, states.grad


def compare(data, chunk_bytes, **options):
    """Compare values and gradients with the reference; return our gradients."""
    options = {"weigh": make_weigh(LossConfig(), block_size=6), **options}
    ours, our_grad = run(frozen_head_nll, *data, chunk_bytes=chunk_bytes, **options)
    theirs, their_grad = run(frozen_head_nll_reference, *data, **options)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-5)
    return our_grad


@pytest.mark.parametrize(
    ("head", "chunk_bytes", "num_candidates"),
    [("plain", ALL, 1), ("capped", 300, 1), ("scaled", 4, 1), ("both", 4, 8), ("both", 300, 2), ("both", ALL, 8)],
)
def test_equals_the_plain_reference(head, chunk_bytes, num_candidates, monkeypatch):
    """For every kind of head, for tiles of one logit, of a few and of all, and with the best tokens of each slot.

    Each logit is computed once, and no more of them exist at once than fit into the bytes.
    """
    sizes = []
    add_tile = head_scores._add_tile

    def watched(sums, tile, operands, *others):
        sizes.append(len(operands) * len(tile.weight))
        return add_tile(sums, tile, operands, *others)

    monkeypatch.setattr(head_scores, "_add_tile", watched)
    data = problem(head=head)
    grad = compare(data, chunk_bytes, num_candidates=num_candidates)
    _, lm_head, _, is_scored = data
    assert chunk_bytes < ALL or len(sizes) == 1
    assert 4 * max(sizes) <= chunk_bytes and sum(sizes) == is_scored.sum() * len(lm_head.weight)
    assert grad.any() and not grad[1].any() and not grad[:, :, 0].any()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 40), st.integers(4, 999))
def test_equals_the_plain_reference_for_any_shape(batch, blocks, slots, vocab, chunk_bytes):
    compare(problem(batch=batch, blocks=blocks, slots=slots, hidden=8, vocab=vocab), chunk_bytes)


@pytest.mark.parametrize("token_loss", get_args(TokenLoss))
def test_soft_losses_equal_the_plain_reference(token_loss, monkeypatch):
    """Logits and their copies of a few rows at once fit into the bytes."""
    sizes = []
    soft_scores = head_scores._soft_scores
    monkeypatch.setattr(head_scores, "_soft_scores", lambda *args: sizes.append(len(args[0])) or soft_scores(*args))
    data = problem(head="plain" if token_loss == "nll" else "both")
    weigh = make_weigh(LossConfig(confidence="overlap"), block_size=6)
    compare(data, 9000, weigh=weigh, token_loss=token_loss, target_hidden=torch.randn(data[0].shape))
    assert 1 < max(sizes) <= 9000 / 4 / head_scores.SOFT_COPIES / len(data[1].weight)


def test_the_first_of_equal_tokens_is_the_best_and_nothing_is_kept_for_no_gradient():
    states, head, labels, is_scored = problem()
    rows = is_scored.flatten().nonzero()[:, 0]
    options = {"token_loss": "nll", "target_hidden": None, "chunk_bytes": 300, "num_candidates": 1}
    scores = head_scores.score_tokens(torch.zeros_like(states), head, labels, is_scored, rows, **options)
    assert not scores.top_tokens[is_scored].any() and scores.grad is None


@pytest.mark.wide
def test_the_compiled_tile_equals_the_plain_reference(monkeypatch, unchecked_types):
    """What runs on a GPU: a graph for all numbers of rows and columns, one without gradient, a recompile of each."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(head_scores, "TILED", ("cpu",))
    compiled = torch.compile(head_scores._add_tile, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(head_scores, "_compiled_add_tile", lambda: compiled)
    for batch, chunk_bytes in ((3, 300), (4, 2000), (2, 9000)):
        compare(problem(batch=batch, head="both"), chunk_bytes)
    states, head, labels, is_scored = problem(batch=3)
    is_one = torch.zeros_like(is_scored)
    is_one[0, 0, 1] = True
    for needs_grad in (True, False):
        for rows in (is_scored, is_one):
            for chunk_bytes in (4 * int(is_scored.sum()) * (len(head.weight) - 1), 300, ALL):
                with torch.set_grad_enabled(needs_grad):
                    frozen_head_nll(states.clone().requires_grad_(), head, labels, rows, chunk_bytes=chunk_bytes)
    assert 1 <= counter.frame_count <= 4


def test_options_reach_the_weights():
    is_scored = torch.tensor([[[False, True, True, False, True]]])
    probs, overlap = torch.rand(2, 1, 1, 5)
    slots = Slots(is_scored, probs, is_scored, overlap, progress=0.75)
    expected = {
        LossConfig(alpha=1.0, alpha_end=0.0): dpace_weights(probs, is_scored, 0.25),
        LossConfig(alpha=0.4, confidence="overlap"): dpace_weights(overlap, is_scored, 0.4),
        LossConfig(objective="dflash", gamma=3.0): dflash_weights(is_scored, 3.0),
        LossConfig(objective="medusa", base=0.5): medusa_weights(is_scored, 0.5),
    }
    for config, weights in expected.items():
        torch.testing.assert_close(make_weigh(config, block_size=8)(slots), weights)


def test_the_loss_computes_as_many_logits_at_once_as_the_options_say():
    weight = torch.empty(50_000, 1, device="meta")
    assert chunk_bytes_of(LossConfig(chunk_mib=3), weight, is_cpu=True) == 3 * 2**20
    sizes = [chunk_bytes_of(LossConfig(token_loss=loss), weight, is_cpu=True) for loss in ("nll", "kl")]
    assert sizes[0] == 4 * 2**20 < sizes[1]


def test_an_objective_of_ones_own_is_tried_out_on_what_the_loss_gives():
    """Slot 0 never counts, and there is no overlap where the loss does not compute it."""
    seen = []
    for confidence in ("token", "overlap"):
        make_weigh(LossConfig(confidence=confidence), 4, lambda slots: seen.append(slots) or slots.token_probs)
    assert seen[0].overlap is None and seen[1].overlap is not None
    assert not any(slots.is_scored[..., 0].any() for slots in seen)


def test_weights_of_an_objective_of_ones_own_that_are_wrong_become_nan():
    """Also where they are right when the objective is tried out; others count in scored slots only."""
    weights = iter((1.0, -1.0, torch.inf))
    weigh = make_weigh(LossConfig(), 4, lambda slots: torch.full_like(slots.token_probs, next(weights)))
    is_scored = torch.tensor([[[False, True, True, False]]])
    for _ in range(2):
        found = weigh(Slots(is_scored, torch.ones(1, 1, 4), is_scored, None))
        assert torch.equal(found.isnan(), is_scored) and not found[~is_scored].any()
    with pytest.raises(ValueError, match=r"gives the shape \(3, 4\), expected a tensor \(2, 3, 4\)"):
        make_weigh(LossConfig(), 4, lambda slots: slots.token_probs[0])


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs target_hidden"):
        frozen_head_nll(*problem(), token_loss="kl")
    with pytest.raises(ValueError, match=r"no objective 'dpace.tv'.* add \+kl or \+lk"):
        with_objective(LossConfig(), "dpace+tv")
    with pytest.raises(ValueError, match=r"the objective dflash has no confidence, .*; take it out"):
        with_objective(LossConfig(), "dflash+kl+overlap")
    named = LossConfig(alpha=0.3, objective="bv", token_loss="kl", confidence="overlap")
    assert with_objective(LossConfig(alpha=0.3), "bv+kl+overlap") == named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_sure_row_does_not_cancel(dtype):
    """Where the label has nearly all the probability, `softmax - onehot` still has some correct digits."""
    *_, labels, is_scored = problem()
    labels = labels.where(is_scored, 0)
    head = LmHead(torch.eye(50, dtype=dtype))
    states = 12 * head.weight[labels]
    exact = states.double().requires_grad_()
    nll = -exact.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    nll[is_scored].sum().backward()
    assert nll[is_scored].max() < 1e-2
    _, grad = run(frozen_head_nll, states, head, labels, is_scored, chunk_bytes=300)
    assert (grad - exact.grad).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * exact.grad.norm()


@pytest.mark.parametrize("is_autocast", [True, False])
def test_low_precision_is_no_worse_than_naive_low_precision(is_autocast):
    """Under autocast with fp32 operands, and with operands in bf16; statistics are fp32 in both."""
    dtype = torch.float32 if is_autocast else torch.bfloat16
    states, head, *blocks = problem(dtype, batch=8, blocks=16, hidden=64, vocab=1000)
    exact, exact_grad = run(frozen_head_nll_reference, states.float(), LmHead(head.weight.float()), *blocks)
    errors = []
    for function in (frozen_head_nll_reference, frozen_head_nll):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            out, grad = run(function, states, head, *blocks)
        errors.append([(out.losses - exact.losses).norm(), (grad.float() - exact_grad).norm()])
    assert out.nll.dtype == torch.float32
    assert all(ours <= 1.05 * naive for naive, ours in zip(*errors, strict=True))


def test_reductions_by_hand():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    is_scored = torch.zeros(2, 3, 3, dtype=torch.bool)
    is_scored[0, :, 1] = is_scored[0, 0, 2] = is_scored[1, 0, 1] = True
    weights = torch.full((2, 3, 3), 0.25)
    expected = {"batch": (10, 2), "anchors": (6 / 3 + 4 / 1, 2), "slots": (10, 5), "weights": (10, 18 * 0.25)}
    for reduction in get_args(Reduction):
        assert block_loss(losses, is_scored, weights, reduction=reduction) == expected[reduction]
    assert block_loss(torch.zeros(2, 3), is_scored & False, weights) == (0, 0)
