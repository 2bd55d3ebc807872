"""Token losses and their gradients through the frozen LM head, tile by tile, without keeping logits."""

import functools
import math
from typing import Any, NamedTuple, assert_never

import torch
from jaxtyping import Float
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


class _Scores(NamedTuple):
    """Losses, statistics and gradient of some rows; all are "rows 1" but `grad`."""

    losses: Tensor
    nll: Tensor
    overlap: Tensor | None
    top_tokens: Tensor
    """The best tokens, "rows candidate"."""
    grad: Tensor | None
    """Gradient of `losses` with respect to the rows, "rows hidden"; None where none is needed."""


def _hard_scores(
    rows: Tensor, head: LmHead, labels: Tensor, num_columns: int, needs_grad: bool, num_candidates: int
) -> _Scores:
    """Compute the cross-entropy with the labels, `num_columns` tokens of the vocabulary at a time.

    The gradient, `softmax @ W - W[label]`, is attention of the rows over the vocabulary with the head as keys and
    values. It is computed as in FlashAttention (arXiv 2205.14135): sums relative to a running maximum, scaled again
    where it grows. The label's own token is left out of the sums, so that the gradient does not cancel in rows where
    the drafter is certain.
    """
    weight = head.weight
    operands = rows.to(weight.dtype)
    zeros = torch.zeros(labels.shape, device=rows.device)
    grad = torch.zeros(rows.shape if needs_grad else (), device=rows.device)
    top_tokens = torch.zeros_like(labels).repeat(1, num_candidates)
    # Below any logit, so that the first tile takes all places.
    top_logits = torch.full_like(top_tokens, -torch.inf, dtype=grad.dtype)
    # A tile adds to sums in place, so no two of them may share memory.
    sums = _Sums(top_logits, zeros, zeros.clone(), top_tokens, grad)
    for start in range(0, len(weight), num_columns):
        tile = head._replace(weight=weight[start : start + num_columns])
        # A size of 1 would be a graph of its own, and torch runs eagerly where a function has more than eight.
        is_compiled = rows.device.type in TILED and min(len(rows), len(tile.weight)) > 1
        add_tile = _compiled_add_tile() if is_compiled else _add_tile
        # The start is a tensor, because a number 0 would be a graph of its own too.
        sums = add_tile(sums, tile, operands, labels - start, torch.full_like(labels, start), needs_grad)
    peak = sums.top_logits[:, :1]
    # The label joins here: the tiles left it out.
    total = sums.others + (sums.label_logits - peak).exp()
    nll = peak + total.log() - sums.label_logits
    grad = None
    if needs_grad:
        # The label's row has the factor q - 1. It is minus the probability of all others, whose sum loses no digits.
        other_prob = sums.others / total
        slope = head.slope(sums.label_logits)
        if slope is not None:
            other_prob = other_prob * slope
        grad = sums.grad.div_(total).addcmul_(other_prob, weight[labels[:, 0]].float(), value=-1).mul_(head.multiplier)
    return _Scores(nll, nll, None, sums.top_tokens, grad)


class _Sums(NamedTuple):
    """Sums over a part of the vocabulary for some rows; "rows 1" where nothing else is said."""

    top_logits: Tensor
    """The highest logits, "rows candidate"; the exponentials are relative to the first."""
    label_logits: Tensor
    others: Tensor
    """Sum of exp(logit - highest) of all tokens but the label."""
    top_tokens: Tensor
    """Tokens of the highest logits, "rows candidate"."""
    grad: Tensor
    """Sum of exp(logit - highest) times the head's row, "rows hidden"; one 0 where no gradient is needed."""


def _add_tile(sums: _Sums, tile: LmHead, operands: Tensor, column: Tensor, start: Tensor, needs_grad: bool) -> _Sums:
    """Add the tokens of a part of the head; `column` is the label's, which may lie in another part."""
    logits = tile.logits(operands).float()  # (rows, columns)
    peak_before = sums.top_logits[:, :1]
    num_candidates = sums.top_logits.shape[1]
    if num_candidates == 1:
        index = argmax(logits)[:, None]
        highest = logits.gather(-1, index)
        # Strictly greater: on ties the token of the earlier tile stays, as argmax over a whole row would choose.
        top_tokens = torch.where(highest > peak_before, index + start, sums.top_tokens)
        top_logits = torch.maximum(peak_before, highest)
    else:
        highest, index = topk(logits, min(num_candidates, logits.shape[1]))
        # Stable, with the tokens of earlier tiles first: on ties these stay.
        both, order = torch.cat([sums.top_logits, highest], dim=1).sort(stable=True, dim=-1, descending=True)
        top_logits = both[:, :num_candidates]
        order = order[:, :num_candidates]
        top_tokens = torch.cat([sums.top_tokens, index + start], dim=1).gather(1, order)
    peak = top_logits[:, :1]
    # Earlier sums are relative to the peak before.
    rescale = (peak_before - peak).exp_()
    # Of a label in another tile some column is read, and then not used: all rows take the same steps.
    inside = column.clamp(0, len(tile.weight) - 1)
    is_here = column == inside
    column_logits = logits.gather(-1, inside)
    label_logits = torch.where(is_here, column_logits, sums.label_logits)
    # Before the logits are overwritten, which the slope is computed from.
    slope = tile.slope(logits) if needs_grad else None
    logits.scatter_(-1, inside, column_logits.masked_fill(is_here, -torch.inf))
    exps = logits.sub_(peak).exp_()
    others = sums.others.mul_(rescale).add_(exps.sum(-1, keepdim=True))
    grad = sums.grad
    if needs_grad:
        if slope is not None:
            exps = exps.mul_(slope)
        grad = grad.mul_(rescale).add_(exps.to(tile.weight.dtype) @ tile.weight)
    return _Sums(top_logits, label_logits, others, top_tokens, grad)


@functools.cache
def _compiled_add_tile():
    """Fuse all between the two products; sizes are symbols, since every batch has another number of rows."""
    return torch.compile(_add_tile, dynamic=True)


def _soft_scores(
    rows: Tensor, target_rows: Tensor, head: LmHead, labels: Tensor, token_loss: TokenLoss, needs_grad: bool
) -> _Scores:
    """Compute the token loss with gradient, and the overlap of the drafter's and the target's distribution.

    This needs whole rows of both.
    """
    logits = head.logits(rows).float()  # (rows, vocab), as all that follow
    log_probs = logits.log_softmax(-1)
    log_target = head.logits(target_rows).float().log_softmax(-1)
    probs = log_probs.exp()
    target_probs = log_target.exp()
    overlap = torch.minimum(probs, target_probs).sum(-1, keepdim=True)
    nll = -log_probs.gather(-1, labels)
    top_tokens = argmax(logits)[:, None]
    # The gradients are with respect to the logits. They overwrite `probs`, which nobody reads after that.
    if token_loss == "nll":
        losses = nll
        grad = probs.scatter_add_(-1, labels, -torch.ones_like(nll))
    elif token_loss == "kl":
        losses = (target_probs * log_target.sub_(log_probs)).sum(-1, keepdim=True)
        grad = probs.sub_(target_probs)
    elif token_loss == "lk":
        losses = -overlap.clamp_min(TINY).log()
        # d overlap / d probs is 1 where the drafter's probability is below the target's, else 0.
        falls_short = (probs < target_probs).float()
        # Through the softmax's Jacobian, q_i (delta_ij - q_j), the mean of it is taken off.
        mean = (probs * falls_short).sum(-1, keepdim=True)
        grad = probs.mul_(mean - falls_short).div_(overlap.clamp_min(TINY))
    else:
        assert_never(token_loss)
    rows_grad = None
    if needs_grad:
        slope = head.slope(logits)
        if slope is not None:
            grad = grad.mul_(slope)
        rows_grad = (grad.to(head.weight.dtype) @ head.weight) * head.multiplier
    return _Scores(losses, nll, overlap, top_tokens, rows_grad)


class TokenLosses(torch.autograd.Function):
    """Token losses of all slots, whose gradient is computed in the forward pass.

    Both are computed for a chunk of the scored rows at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: LmHead,
        labels: Tensor,
        is_scored: Tensor,
        scored_rows: Tensor,
        token_loss: TokenLoss,
        target_hidden: Tensor | None,
        chunk_bytes: int,
        num_candidates: int,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Compute losses, nll, overlap (None for hard losses) and top tokens of all slots.

        Arguments as in `dpace.loss.frozen_head_nll`.
        """
        needs_grad = ctx.needs_input_grad[0]
        # What stays where a slot is not scored: no loss, an overlap of 1, and no token.
        losses = torch.zeros(is_scored.shape, device=hidden.device)
        nll = torch.zeros_like(losses)
        overlap = None if target_hidden is None else torch.ones_like(losses)
        top_tokens = torch.full((*labels.shape, num_candidates), -1, device=labels.device)
        grad = torch.zeros_like(hidden) if needs_grad else None
        outputs = (losses, nll, overlap, top_tokens)
        num_logits = chunk_bytes // 4  # of fp32
        num_rows = math.isqrt(num_logits)  # square tiles reread rows and head the least
        if target_hidden is not None:
            num_rows = num_logits // SOFT_COPIES // len(head.weight)
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
            # In the order of the fields of `_Scores`.
            for values, whole in zip(scores, (*outputs, grad), strict=True):
                if values is not None and whole is not None:
                    whole.view(is_scored.numel(), -1)[chunk] = values.to(whole.dtype)
            del scores  # frees memory before the next chunk is computed
        ctx.save_for_backward(grad)
        # Only the losses carry a gradient.
        ctx.mark_non_differentiable(*[statistic for statistic in outputs[1:] if statistic is not None])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        """Scale the kept gradient by the gradient of each slot's loss."""
        (grad,) = ctx.saved_tensors
        # `out` keeps the dtype of the hidden states, where the product of bf16 and fp32 would be fp32.
        hidden_grad = torch.mul(grad, grad_losses[..., None], out=torch.empty_like(grad))
        return hidden_grad, *[None] * 8  # nothing for the other arguments of `forward`


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
