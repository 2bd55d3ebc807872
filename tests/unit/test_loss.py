import pytest
import torch

from dpace.config import LossConfig
from dpace.loss import REDUCTIONS, Head, block_loss, count_items, frozen_head_nll, frozen_head_nll_reference
from dpace.train import make_weigh

OBJECTIVES = ["dpace", "dpace-confidence-only", "dpace-continuation-only", "dflash", "uniform", "head"]
HEADS = {"plain": (1.0, None), "capped": (1.0, 5.0), "scaled": (0.25, None), "both": (0.5, 3.0)}


def problem(dtype=torch.float32, batch=3, blocks=5, slots=6, hidden=16, vocab=50, head="plain"):
    torch.manual_seed(1)
    states = torch.randn(batch, blocks, slots, hidden, dtype=dtype)
    labels = torch.randint(vocab, (batch, blocks, slots))
    is_scored = torch.rand(batch, blocks, slots) < 0.7
    is_scored[..., 0] = False
    is_scored[1] = False
    labels[~is_scored] = 10**6  # must never be looked up
    return states, Head(torch.randn(vocab, hidden, dtype=dtype), *HEADS[head]), labels, is_scored


def run(function, states, head, labels, is_scored, **options):
    states = states.clone().requires_grad_()
    out = function(states, head, labels, is_scored, **options)
    block_loss(out.losses, is_scored).backward()
    return out, states.grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_equals_the_plain_reference(objective, head, chunk_rows):
    data = problem(head=head)
    weigh = make_weigh(LossConfig(objective=objective), block_size=6)
    ours, our_grad = run(frozen_head_nll, *data, weigh=weigh, chunk_rows=chunk_rows)
    theirs, their_grad = run(frozen_head_nll_reference, *data, weigh=weigh)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
    assert float((our_grad - their_grad).norm() / their_grad.norm()) < 1e-6
    assert not our_grad[1].any() and not our_grad[:, :, 0].any()


def test_bf16_is_no_worse_than_naive_bf16():
    states, head, labels, is_scored = problem(torch.bfloat16, batch=8, blocks=16, hidden=64, vocab=1000)
    weigh = make_weigh(LossConfig(), block_size=6)
    exact = run(
        frozen_head_nll_reference,
        states.float(),
        head._replace(weight=head.weight.float()),
        labels,
        is_scored,
        weigh=weigh,
    )
    naive = run(frozen_head_nll_reference, states, head, labels, is_scored, weigh=weigh)
    ours = run(frozen_head_nll, states, head, labels, is_scored, weigh=weigh)
    assert ours[0].weights.dtype == ours[0].nll.dtype == torch.float32
    for pick in (lambda r: r[0].losses, lambda r: r[1].float()):
        our_error, naive_error = ((pick(r) - pick(exact)).norm() for r in (ours, naive))
        assert our_error <= 1.05 * naive_error


def test_without_gradient_the_same_numbers():
    states, head, labels, is_scored = problem()
    with torch.no_grad():
        out = frozen_head_nll(states, head, labels, is_scored)
    reference = frozen_head_nll_reference(states, head, labels, is_scored)
    torch.testing.assert_close(out.nll, reference.nll)
    assert torch.equal(out.top_tokens, reference.top_tokens) and not out.losses.requires_grad


def test_no_scored_slot_gives_zero_loss_and_gradient():
    states, head, labels, is_scored = problem()
    out, grad = run(frozen_head_nll, states, head, labels, torch.zeros_like(is_scored))
    assert not out.losses.any() and not grad.any()


def test_reductions_by_hand():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    is_scored = torch.zeros(2, 3, 3, dtype=torch.bool)
    is_scored[0, :, 1] = is_scored[0, 0, 2] = is_scored[1, 0, 1] = True
    assert block_loss(losses, is_scored, reduction="batch") == 10 / 2
    assert block_loss(losses, is_scored, reduction="anchors") == (6 / 3 + 4 / 1) / 2
    assert block_loss(losses, is_scored, reduction="slots") == 10 / 5
    with pytest.raises(ValueError, match="reduction"):
        block_loss(losses, is_scored, reduction="mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_split_batch_adds_up_to_the_whole(reduction):
    states, head, labels, is_scored = problem(batch=8)

    def loss(rows, num_items):
        out = frozen_head_nll(states[rows], head, labels[rows], is_scored[rows])
        return block_loss(out.losses, is_scored[rows], reduction=reduction, num_items=num_items)

    num_items = count_items(is_scored, reduction)
    whole = loss(slice(None), None)
    parts = [loss(slice(i, i + 1), num_items) for i in range(8)]  # row 1 has no scored slot
    torch.testing.assert_close(sum(parts), whole)
