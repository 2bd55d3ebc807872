import inspect
import subprocess
import sys
from typing import get_args
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from dpace.config import LossConfig, Objective, TokenLoss
from dpace.drafter.selector import leading_matches
from dpace.drafter.vocabulary import DraftRows
from dpace.loss import (
    REDUCTIONS,
    block_loss,
    candidate_logits,
    count_items,
    frozen_head_nll,
    frozen_head_nll_reference,
    head_scores,
)
from dpace.loss.objective import make_weigh, with_objective
from dpace.target.head import LmHead
from tests.support.cases import wide

OBJECTIVES = get_args(Objective)
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
    block_loss(out.losses, is_scored).backward()
    return out, states.grad


def compare(data, chunk_bytes, **options):
    """Compare values and gradients with the reference; return our gradients."""
    ours, our_grad = run(frozen_head_nll, *data, chunk_bytes=chunk_bytes, **options)
    theirs, their_grad = run(frozen_head_nll_reference, *data, **options)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
    assert float((our_grad - their_grad).norm() / their_grad.norm()) < 1e-6
    return our_grad


@pytest.mark.parametrize("objective", wide(OBJECTIVES, "dpace", "uniform"))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_bytes", [4, 300, None])
def test_equals_the_plain_reference(objective, head, chunk_bytes):
    weigh = make_weigh(LossConfig(objective=objective), block_size=6)
    grad = compare(problem(head=head), chunk_bytes, weigh=weigh)
    assert not grad[1].any() and not grad[:, :, 0].any()


@pytest.mark.parametrize("num_candidates", [2, 8])
@pytest.mark.parametrize("chunk_bytes", [4, 300, None])
def test_the_best_tokens_of_each_slot_are_exact(num_candidates, chunk_bytes):
    compare(problem(head="both"), chunk_bytes, num_candidates=num_candidates)


def test_the_logits_of_a_few_tokens_have_the_gradient_of_all():
    states, head, labels, _ = problem(head="both")
    candidates = torch.randint(50, (*labels.shape, 3))
    states.requires_grad_()
    found = candidate_logits(states, head, candidates)
    expected = head.logits(states).gather(-1, candidates)
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(x, states, seed)[0] for x in (found, expected)))


def test_the_compiled_tile_equals_the_plain_reference(monkeypatch):
    """What runs on a GPU: a graph for all numbers of rows and columns, one without gradient, a recompile of each."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(head_scores, "TILED", ("cpu",))
    for name in ("logits", "finish", "slope"):  # without the checks of types, which cannot be compiled
        monkeypatch.setattr(LmHead, name, inspect.unwrap(getattr(LmHead, name)))
    tile = inspect.unwrap(head_scores._add_tile)
    compiled = torch.compile(tile, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(head_scores, "_compiled_add_tile", lambda: compiled)
    for batch, chunk_bytes in ((3, 300), (4, 2000), (2, 9000)):
        compare(problem(batch=batch, head="both"), chunk_bytes)
    states, head, labels, is_scored = problem(batch=3)
    is_one = torch.zeros_like(is_scored)
    is_one[0, 0, 1] = True
    for needs_grad in (True, False):
        for rows in (is_scored, is_one):
            for chunk_bytes in (4 * int(is_scored.sum()) * (len(head.weight) - 1), 300, None):
                with torch.set_grad_enabled(needs_grad):
                    frozen_head_nll(states.clone().requires_grad_(), head, labels, rows, chunk_bytes=chunk_bytes)
    assert 1 <= counter.frame_count <= 4


@pytest.mark.parametrize("token_loss", get_args(TokenLoss))
@pytest.mark.parametrize("confidence", ["token", "overlap"])
@pytest.mark.parametrize("objective", wide(["dpace", "dpace-exact", "uniform"], "dpace"))
@pytest.mark.parametrize("head", wide(HEADS, "both"))
def test_soft_losses_equal_the_plain_reference(token_loss, confidence, objective, head):
    data = problem(head=head)
    options = {
        "weigh": make_weigh(LossConfig(objective=objective, confidence=confidence), block_size=6),
        "token_loss": token_loss,
        "target_hidden": torch.randn(data[0].shape),
    }
    compare(data, 9000, **options)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 40), st.integers(4, 999))
def test_equals_the_plain_reference_for_any_shape(batch, blocks, slots, vocab, chunk_bytes):
    data = problem(batch=batch, blocks=blocks, slots=slots, hidden=8, vocab=vocab)
    ours, theirs = run(frozen_head_nll, *data, chunk_bytes=chunk_bytes), run(frozen_head_nll_reference, *data)
    torch.testing.assert_close(ours[0].losses, theirs[0].losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_the_chain_reward_is_minimized_by_its_weights():
    """Cross-entropy minus the undetached reward, by autograd, has the gradient of the weighted cross-entropy."""
    states, head, labels, is_scored = problem()
    states.requires_grad_()
    log_q = (
        head.logits(states)
        .log_softmax(-1)
        .gather(-1, labels.where(is_scored, 0)[..., None])[..., 0]
        .where(is_scored, 0.0)
    )
    reward = (log_q.exp().cumprod(-1) * is_scored).sum(-1) / is_scored.sum(-1).clamp_min(1)
    block_loss(-log_q.sum(-1) - reward, is_scored).backward()
    weigh = make_weigh(LossConfig(objective="chain-reward"), block_size=6)
    _, grad = run(frozen_head_nll, states.detach(), head, labels, is_scored, weigh=weigh)
    torch.testing.assert_close(grad, states.grad, rtol=1e-4, atol=1e-6)


def test_end_to_end_tv_is_dpace_of_the_overlap_without_smoothing():
    """Bebop's undetached loss, minus the sum of prefix products of the overlap, by autograd."""
    states, head, labels, is_scored = problem()
    target_hidden = torch.randn(states.shape)
    states.requires_grad_()
    q, p = (head.logits(x).softmax(-1) for x in (states, target_hidden))
    overlap = torch.minimum(q, p).sum(-1).where(is_scored, 1.0)
    block_loss(-(overlap.cumprod(-1) * is_scored).sum(-1), is_scored).backward()
    weigh = make_weigh(LossConfig(objective="dpace", confidence="overlap", alpha=0.0), block_size=6)
    options = {"weigh": weigh, "token_loss": "lk", "target_hidden": target_hidden}
    _, grad = run(frozen_head_nll, states.detach(), head, labels, is_scored, **options)
    torch.testing.assert_close(grad, states.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_leading_matches_are_the_greedy_prefix():
    states, head, labels, is_scored = problem(vocab=3)
    out = frozen_head_nll(states, head, labels, is_scored)
    rows = Mock(spec=DraftRows, logits=head.logits, tokens=lambda index: index)
    found = leading_matches(states, rows, labels, is_scored)
    for b, n in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        length = 0
        while (
            length < 5
            and is_scored[b, n, length + 1]
            and out.candidates[b, n, length + 1, 0] == labels[b, n, length + 1]
        ):
            length += 1
        assert found[b, n].tolist() == [1 <= slot <= length for slot in range(6)]


def test_settings_that_do_not_fit_are_refused():
    states, head, labels, is_scored = problem()
    with pytest.raises(ValueError, match="token_loss is 'tv'; choose one of nll"):
        inspect.unwrap(frozen_head_nll)(states, head, labels, is_scored, token_loss="tv")  # past the tests' types
    with pytest.raises(ValueError, match="needs target_hidden"):
        frozen_head_nll(states, head, labels, is_scored, token_loss="kl")
    with pytest.raises(ValueError, match="'overlap' compares"):
        weigh = make_weigh(LossConfig(confidence="overlap"), block_size=6)
        frozen_head_nll(states, head, labels, is_scored, weigh=weigh)
    with pytest.raises(ValueError, match="no objective 'dpace.tv'"):
        with_objective(LossConfig(), "dpace+tv")
    with pytest.raises(ValueError, match=r"the objective dflash has no confidence, .*; take it out"):
        with_objective(LossConfig(), "dflash+kl+overlap")
    assert with_objective(LossConfig(alpha=0.3), "dpace+kl+overlap") == LossConfig(
        alpha=0.3, token_loss="kl", confidence="overlap"
    )


@pytest.mark.wide
def test_inside_a_compiled_step_the_same_gradient():
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    code = """
import torch
from dpace.loss import block_loss, frozen_head_nll
from dpace.target.head import LmHead
torch.manual_seed(0)
layer, head = torch.nn.Linear(16, 16), LmHead(torch.randn(50, 16))
states, labels, is_scored = torch.randn(2, 3, 4, 16), torch.randint(50, (2, 3, 4)), torch.rand(2, 3, 4) < 0.7
def step(x):
    return block_loss(frozen_head_nll(layer(x).relu(), head, labels, is_scored).losses, is_scored)
grads = []
for function in (step, torch.compile(step, backend="aot_eager")):
    layer.zero_grad()
    function(states).backward()
    grads.append(layer.weight.grad)
torch.testing.assert_close(*grads)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_sure_row_does_not_cancel(dtype):
    """Where the label has nearly all the probability, `softmax - onehot` still has some correct digits."""
    states, head, labels, is_scored = problem(dtype, hidden=64)
    labels = labels.where(is_scored, 0)
    states = (12 * torch.linalg.pinv(head.weight.float())[:, labels].movedim(0, -1)).to(dtype)
    exact = states.double().requires_grad_()
    nll = -(exact @ head.weight.double().T).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    block_loss(nll.where(is_scored, 0.0).sum(-1), is_scored).backward()
    assert nll[is_scored].max() < 1e-2
    _, grad = run(frozen_head_nll, states, head, labels, is_scored, chunk_bytes=300)
    assert (grad - exact.grad).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * exact.grad.norm()


def test_reductions_by_hand():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    is_scored = torch.zeros(2, 3, 3, dtype=torch.bool)
    is_scored[0, :, 1] = is_scored[0, 0, 2] = is_scored[1, 0, 1] = True
    assert block_loss(losses, is_scored, reduction="batch") == 10 / 2
    assert block_loss(losses, is_scored, reduction="anchors") == (6 / 3 + 4 / 1) / 2
    assert block_loss(losses, is_scored, reduction="slots") == 10 / 5
    assert block_loss(losses, is_scored, reduction="weights", num_items=torch.tensor(0.25)) == 10 / 0.25
    assert block_loss(torch.zeros(2, 3), is_scored & False, num_items=0) == 0
    with pytest.raises(ValueError, match="reduction is 'mean'; choose one of"):
        inspect.unwrap(block_loss)(losses, is_scored, reduction="mean", num_items=1)  # past the tests' types
    with pytest.raises(ValueError, match="only after the forward pass"):
        block_loss(losses, is_scored, reduction="weights")


@pytest.mark.parametrize("is_autocast", [True, False])
def test_low_precision_is_no_worse_than_naive_low_precision(is_autocast):
    """Under autocast with fp32 operands, and with operands in bf16; statistics are fp32 in both."""
    dtype = torch.float32 if is_autocast else torch.bfloat16
    states, head, labels, is_scored = problem(dtype, batch=8, blocks=16, hidden=64, vocab=1000)
    weigh = make_weigh(LossConfig(), block_size=6)
    whole = head._replace(weight=head.weight.float())
    exact = run(frozen_head_nll_reference, states.float(), whole, labels, is_scored, weigh=weigh)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        naive, ours = (
            run(function, states, head, labels, is_scored, weigh=weigh)
            for function in (frozen_head_nll_reference, frozen_head_nll)
        )
    assert ours[0].weights.dtype == ours[0].nll.dtype == torch.float32
    for pick in (lambda r: r[0].losses, lambda r: r[1].float()):
        our_error, naive_error = ((pick(r) - pick(exact)).norm() for r in (ours, naive))
        assert our_error <= 1.05 * naive_error


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_split_batch_adds_up_to_the_whole(reduction):
    states, head, labels, is_scored = problem(batch=8)  # row 1 has no scored slot
    losses, weights = [frozen_head_nll(states, head, labels, is_scored)[i] for i in (0, 2)]
    num_items = count_items(is_scored, reduction, weights)
    rows = [slice(None), *(slice(i, i + 1) for i in range(8))]
    whole, *parts = (block_loss(losses[r], is_scored[r], reduction=reduction, num_items=num_items) for r in rows)
    torch.testing.assert_close(sum(parts), whole)
    assert parts[1] == 0
