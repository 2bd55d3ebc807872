"""Token losses and their gradients through the frozen LM head, tile by tile, without keeping logits.

The scored rows are taken in chunks. A tile of their logits is computed once and used for statistics, loss and gradient;
then it is dropped. That takes two products with the head: no logits are kept or recomputed, and rows that are not
scored are never multiplied. Soft losses take whole rows, and a third product for the target's logits.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.config import LossConfig, TokenLoss
from dpace.fast.top import argmax, topk
from dpace.system.device import TILED
from dpace.target.head import TINY, LmHead

CPU_CHUNK_BYTES = 4 * 2**20
"""Bytes of fp32 logits that exist at once on a CPU: they fit into a core's cache."""
GPU_CHUNK_BYTES = 2**30
"""The same on a GPU: enough to keep it busy."""
MIN_SOFT_ROWS = 384
"""Least number of rows that soft losses compute at once; they need whole rows, and fewer make the products slower."""
SOFT_COPIES = 6
"""Number of fp32 tensors of the logits' size that soft losses need."""


class TokenScores(NamedTuple):
    """Losses, statistics and gradient of some rows, all "rows 1", or of all slots, all "batch block slot"."""

    losses: Tensor
    nll: Tensor
    """Negative log-likelihood of the label, whatever the loss."""
    overlap: Tensor | None
    """Sum over tokens of the smaller of the drafter's and the target's probability; None for hard losses."""
    top_tokens: Tensor
    """The best tokens, best first; the last axis is "candidate"."""
    grad: Tensor | None
    """Gradient of each loss with respect to its hidden state, whose axis comes last; None where none is needed."""


def score_tokens(
    hidden: Float[Tensor, "batch block slot hidden"],
    head: LmHead,
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
    scored_rows: Int[Tensor, " row"],
    *,
    token_loss: TokenLoss,
    target_hidden: Float[Tensor, "batch block slot hidden"] | None,
    chunk_bytes: int,
    num_candidates: int,
) -> TokenScores:
    """Compute the token losses of all slots, which carry their gradient, and statistics, which carry none.

    Memory: `chunk_bytes`, and two gradients of the size of `hidden`; nothing grows with rows x vocabulary.

    Args and returns as in `dpace.loss.frozen_head_nll`. A slot that is not scored has no loss, an overlap of 1, and the
    token -1.
    """
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    num_logits = chunk_bytes // 4  # of fp32
    num_rows = math.isqrt(num_logits)  # square tiles reread rows and head the least
    if target_hidden is not None:
        num_rows = num_logits // SOFT_COPIES // len(head.weight)
    with torch.no_grad():
        losses = torch.zeros(is_scored.shape, device=hidden.device)
        of_all = TokenScores(
            losses=losses,
            nll=torch.zeros_like(losses),
            overlap=None if target_hidden is None else torch.ones_like(losses),
            top_tokens=torch.full((*labels.shape, num_candidates), -1, device=labels.device),
            grad=torch.zeros_like(hidden) if needs_grad else None,
        )
        for chunk in scored_rows.split(max(1, num_rows)):
            # Indices into (batch * block * slot).
            rows = hidden.flatten(0, 2)[chunk]
            row_labels = labels.flatten()[chunk, None]
            if target_hidden is None:
                # A last chunk of few rows takes more columns instead.
                num_columns = max(1, num_logits // max(1, len(rows)))
                scores = _hard_scores(rows, head, row_labels, num_columns, needs_grad, num_candidates)
            else:
                target_rows = target_hidden.flatten(0, 2)[chunk]
                scores = _soft_scores(rows, target_rows, head, row_labels, token_loss, needs_grad)
            for values_of_all, values in zip(of_all, scores, strict=True):
                if values_of_all is not None and values is not None:
                    values_of_all.view(is_scored.numel(), -1)[chunk] = values.to(values_of_all.dtype)
            del scores, values  # frees memory before the next chunk is computed
    if of_all.grad is None:
        return of_all
    return of_all._replace(losses=_WithGradient.apply(losses, hidden, of_all.grad))


class _WithGradient(torch.autograd.Function):
    """Losses of slots with a gradient to the hidden states that is known already."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, hidden: Tensor, grad: Tensor) -> Tensor:
        """Return the losses; `grad` is the gradient of each of them with respect to its row of `hidden`."""
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[None, Tensor, None]:
        """Scale the known gradient by the gradient of each slot's loss, for `hidden` alone."""
        (grad,) = ctx.saved_tensors
        # `out` keeps the dtype of the hidden states, where the product of bf16 and fp32 would be fp32.
        hidden_grad = torch.mul(grad, grad_losses[..., None], out=torch.empty_like(grad))
        return None, hidden_grad, None


def _hard_scores(
    rows: Tensor, head: LmHead, labels: Tensor, num_columns: int, needs_grad: bool, num_candidates: int
) -> TokenScores:
    """Compute the cross-entropy with the labels, `num_columns` tokens of the vocabulary at a time.

    With logits `z` and label `y`, `q = softmax(z)` and the loss is `-log q[y]`. Its gradient with respect to `z[i]` is
    `q[i]`, and `q[y] - 1` at the label; times the slope of the head's cap and the head's row `W[i]`, summed over `i`,
    it is the gradient with respect to the row. That is attention of the rows over the vocabulary with the head as keys
    and values. It is computed as in FlashAttention (arXiv 2205.14135): sums relative to a running maximum, scaled again
    where it grows. The label's own token is left out of the sums, so that the gradient does not cancel in rows where
    the drafter is certain.
    """
    weight = head.weight
    operands = rows.to(weight.dtype)
    num_rows = len(rows)
    zeros = torch.zeros(num_rows, 1, device=rows.device)
    sums = _Sums(
        # Below any logit, so that the first tile takes all places.
        top_logits=torch.full((num_rows, num_candidates), -torch.inf, device=rows.device),
        top_tokens=torch.zeros_like(labels).repeat(1, num_candidates),
        label_logits=zeros,
        others=torch.zeros_like(zeros),
        grad=torch.zeros(rows.shape, device=rows.device) if needs_grad else None,
    )
    for start in range(0, len(weight), num_columns):
        tile = head._replace(weight=weight[start : start + num_columns])
        # A size of 1 would be a graph of its own, and torch runs eagerly where a function has more than eight.
        is_compiled = rows.device.type in TILED and min(num_rows, len(tile.weight)) > 1
        add_tile = _compiled_add_tile() if is_compiled else _add_tile
        # The tile's first token is a tensor, because a number 0 would be a graph of its own too.
        add_tile(sums, tile, operands, labels, torch.full_like(labels, start))
    peak = sums.top_logits[:, :1]
    # The label joins here: the tiles left it out.
    total = sums.others + (sums.label_logits - peak).exp()
    nll = peak + total.log() - sums.label_logits
    grad = sums.grad
    if grad is not None:
        # 1 - q[label] is the probability of all others, whose sum loses no digits.
        other_prob = sums.others / total
        slope = head.slope(sums.label_logits)
        if slope is not None:
            other_prob = other_prob * slope
        label_weights = weight[labels[:, 0]].float()  # (rows, hidden)
        grad.div_(total)
        grad.addcmul_(other_prob, label_weights, value=-1)
        grad.mul_(head.multiplier)
    return TokenScores(losses=nll, nll=nll, overlap=None, top_tokens=sums.top_tokens, grad=grad)


@dataclass
class _Sums:
    """What the tiles so far say of some rows; "rows 1" where nothing else is said. Each tile changes it in place."""

    top_logits: Tensor
    """The highest logits, "rows candidate", the highest first."""
    top_tokens: Tensor
    """Their tokens."""
    label_logits: Tensor
    """The label's logit, once its tile was added."""
    others: Tensor
    """Sum over all tokens but the label of `exp(logit - highest logit)`."""
    grad: Tensor | None
    """Sum over the same tokens of `exp(logit - highest logit) * slope * W[token]`, "rows hidden"; None where no
    gradient is needed."""


def _add_tile(sums: _Sums, tile: LmHead, operands: Tensor, labels: Tensor, first_tokens: Tensor) -> None:
    """Add the tokens of a part of the head, whose first token is `first_tokens`, "rows 1"."""
    logits = tile.logits(operands).float()  # (rows, columns)
    peak_before = sums.top_logits[:, :1]
    _keep_best(sums, logits, first_tokens)
    peak = sums.top_logits[:, :1]

    # Of a label in another tile some column is read, and then not used: all rows take the same steps.
    label_columns = labels - first_tokens
    inside = label_columns.clamp(0, len(tile.weight) - 1)
    is_here = label_columns == inside
    column_logits = logits.gather(-1, inside)
    sums.label_logits = torch.where(is_here, column_logits, sums.label_logits)

    # Before the logits are overwritten, which the slope is computed from.
    slope = None if sums.grad is None else tile.slope(logits)
    # The label's exponential becomes 0, which leaves it out.
    logits.scatter_(-1, inside, column_logits.masked_fill(is_here, -torch.inf))
    logits.sub_(peak)
    exps = logits.exp_()

    # Earlier sums are relative to the peak before.
    rescale = (peak_before - peak).exp()
    sums.others.mul_(rescale)
    sums.others.add_(exps.sum(-1, keepdim=True))
    if sums.grad is not None:
        if slope is not None:
            exps.mul_(slope)
        sums.grad.mul_(rescale)
        sums.grad.add_(exps.to(tile.weight.dtype) @ tile.weight)


def _keep_best(sums: _Sums, logits: Tensor, first_tokens: Tensor) -> None:
    """Let the best tokens of a tile compete with the best of the tiles before."""
    num_candidates = sums.top_logits.shape[1]
    if num_candidates == 1:
        columns = argmax(logits)[:, None]
        highest = logits.gather(-1, columns)
        # Strictly greater: on ties the token of the earlier tile stays, as argmax over a whole row would choose.
        sums.top_tokens = torch.where(highest > sums.top_logits, columns + first_tokens, sums.top_tokens)
        sums.top_logits = torch.maximum(sums.top_logits, highest)
        return
    highest, columns = topk(logits, min(num_candidates, logits.shape[1]))
    top_logits = torch.cat([sums.top_logits, highest], dim=1)
    top_tokens = torch.cat([sums.top_tokens, columns + first_tokens], dim=1)
    # Stable, with the tokens of earlier tiles first: on ties these stay.
    top_logits, order = top_logits.sort(dim=1, descending=True, stable=True)
    sums.top_logits = top_logits[:, :num_candidates]
    sums.top_tokens = top_tokens.gather(1, order[:, :num_candidates])


@functools.cache
def _compiled_add_tile():
    """Fuse all between the two products; sizes are symbols, since every batch has another number of rows."""
    return torch.compile(_add_tile, dynamic=True)


def _soft_scores(
    rows: Tensor, target_rows: Tensor, head: LmHead, labels: Tensor, token_loss: TokenLoss, needs_grad: bool
) -> TokenScores:
    """Compute the token loss with gradient, and the overlap of the drafter's and the target's distribution.

    With `q` the drafter's distribution and `p` the target's, the token loss is

    - `nll`: `-log q[label]`, as in the paper;
    - `kl`: `sum of p log(p / q)`, soft labels;
    - `lk`: `-log sum of min(p, q)`, the negative log of the rate at which speculative sampling accepts (LK, arXiv
      2602.23881).
    """
    logits = head.logits(rows).float()  # (rows, vocab), as all that follow
    log_probs = logits.log_softmax(-1)
    log_target = head.logits(target_rows).float().log_softmax(-1)
    probs = log_probs.exp()
    target_probs = log_target.exp()
    overlap = torch.minimum(probs, target_probs).sum(-1, keepdim=True)
    nll = -log_probs.gather(-1, labels)
    top_tokens = argmax(logits)[:, None]
    # `grad` is the gradient with respect to the logits. It overwrites `probs`, which nobody reads after that.
    if token_loss == "nll":
        # q[i], and q[i] - 1 at the label
        losses = nll
        grad = probs.scatter_add_(-1, labels, -torch.ones_like(nll))
    elif token_loss == "kl":
        # q[i] - p[i]
        log_ratios = log_target.sub_(log_probs)
        losses = (target_probs * log_ratios).sum(-1, keepdim=True)
        grad = probs.sub_(target_probs)
    elif token_loss == "lk":
        # With a = sum of min(p, q), d a / d q[i] is 1 where q[i] falls short of p[i], else 0. Through the softmax's
        # Jacobian, q[i] (delta[ij] - q[j]), its mean under q is taken off: q[i] (mean - falls_short[i]) / a.
        safe_overlap = overlap.clamp_min(TINY)
        losses = -safe_overlap.log()
        falls_short = (probs < target_probs).float()
        mean = (probs * falls_short).sum(-1, keepdim=True)
        grad = probs.mul_(mean - falls_short)
        grad.div_(safe_overlap)
    else:
        assert_never(token_loss)
    rows_grad = None
    if needs_grad:
        slope = head.slope(logits)
        if slope is not None:
            grad.mul_(slope)
        rows_grad = (grad.to(head.weight.dtype) @ head.weight) * head.multiplier
    return TokenScores(losses=losses, nll=nll, overlap=overlap, top_tokens=top_tokens, grad=rows_grad)


def chunk_bytes_of(config: LossConfig, weight: Float[Tensor, "vocab hidden"], *, is_cpu: bool) -> int:
    """Choose how many bytes of fp32 logits exist at once: what the options say, or what makes the products fast.

    It does not depend on free memory, so that a resumed run computes the same bits.

    Args:
        config: of the loss.
        weight: the head's weight, which may be on paper.
        is_cpu: whether a CPU computes.
    """
    if config.chunk_mib:
        return config.chunk_mib * 2**20
    chunk_bytes = CPU_CHUNK_BYTES if is_cpu else GPU_CHUNK_BYTES
    if config.needs_target_probs:
        bytes_of_row = 4 * SOFT_COPIES * len(weight)  # fp32
        chunk_bytes = max(chunk_bytes, MIN_SOFT_ROWS * bytes_of_row)
    return chunk_bytes
