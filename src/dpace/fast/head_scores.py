"""Token losses and their gradients through the frozen LM head, tile by tile, without keeping logits."""

import math
from typing import NamedTuple

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from dpace.config import TokenLoss
from dpace.head import TINY, Head

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 4 * 2**20, 2**30
"""Bytes of fp32 logits that exist at once: enough to fit a core's cache, and enough to keep a GPU busy."""
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
    grad: Tensor | None
    """Gradient of `losses` with respect to the rows, "rows hidden"; None where none is needed."""


def _hard_scores(rows: Tensor, head: Head, labels: Tensor, num_columns: int, needs_grad: bool) -> _Scores:
    """Compute the cross-entropy with the labels, `num_columns` tokens of the vocabulary at a time.

    The gradient, `softmax @ W - W[label]`, is attention of the rows over the vocabulary with the head as keys and
    values. It is computed as in FlashAttention (arXiv 2205.14135): sums relative to a running maximum, scaled again
    where it grows. The label's own token is left out of the sums, so that the gradient does not cancel in rows where
    the drafter is certain.
    """
    weight, operands = head.weight, rows.to(head.weight.dtype)
    peak = torch.full(labels.shape, -torch.inf, device=rows.device)
    label_logits, others = torch.zeros_like(peak), torch.zeros_like(peak)
    top_tokens = torch.zeros_like(labels)
    grad = torch.zeros(rows.shape, device=rows.device) if needs_grad else None
    for start in range(0, len(weight), num_columns):
        part = weight[start : start + num_columns]
        logits = head._replace(weight=part).logits(operands).float()
        highest, index = logits.max(-1, keepdim=True)
        top_tokens = torch.where(highest > peak, index + start, top_tokens)
        new_peak = torch.maximum(peak, highest)
        rescale, peak = (peak - new_peak).exp_(), new_peak
        column = (labels - start).clamp(0, len(part) - 1)
        is_here = labels - start == column
        column_logits = logits.gather(-1, column)
        label_logits = torch.where(is_here, column_logits, label_logits)
        slope = head.slope(logits) if needs_grad else None
        logits.scatter_(-1, column, column_logits.masked_fill(is_here, -torch.inf))
        exps = logits.sub_(peak).exp_()
        others.mul_(rescale).add_(exps.sum(-1, keepdim=True))
        if grad is not None:
            exps = exps if slope is None else exps.mul_(slope)
            grad.mul_(rescale).add_(exps.to(weight.dtype) @ part)
    total = others + (label_logits - peak).exp()
    nll = peak + total.log() - label_logits
    if grad is not None:
        slope = head.slope(label_logits)
        other_prob = others / total if slope is None else others / total * slope
        grad = grad.div_(total).addcmul_(other_prob, weight[labels[:, 0]].float(), value=-1).mul_(head.multiplier)
    return _Scores(nll, nll, None, top_tokens, grad)


def _soft_scores(
    rows: Tensor, target_rows: Tensor, head: Head, labels: Tensor, token_loss: TokenLoss, needs_grad: bool
) -> _Scores:
    """Compute the token loss against the target's distribution, and the overlap of both distributions.

    This needs whole rows of both.
    """
    logits = head.logits(rows).float()
    slope = head.slope(logits) if needs_grad else None
    log_probs, log_target = logits.log_softmax(-1), head.logits(target_rows).float().log_softmax(-1)
    probs, target_probs = log_probs.exp(), log_target.exp()
    overlap = torch.minimum(probs, target_probs).sum(-1, keepdim=True)
    nll, top_tokens = -log_probs.gather(-1, labels), logits.argmax(-1, keepdim=True)
    if token_loss == "nll":
        losses, grad = nll, probs.scatter_add_(-1, labels, -torch.ones_like(nll))
    elif token_loss == "kl":
        losses = (target_probs * log_target.sub_(log_probs)).sum(-1, keepdim=True)
        grad = probs.sub_(target_probs)
    else:  # d overlap / d probs is 1 where the drafter's probability is below the target's, else 0
        losses = -overlap.clamp_min(TINY).log()
        falls_short = (probs < target_probs).float()
        share = (probs * falls_short).sum(-1, keepdim=True)
        grad = probs.mul_(share - falls_short).div_(overlap.clamp_min(TINY))
    if not needs_grad:
        return _Scores(losses, nll, overlap, top_tokens, None)
    grad = grad if slope is None else grad.mul_(slope)
    return _Scores(losses, nll, overlap, top_tokens, (grad.to(head.weight.dtype) @ head.weight) * head.multiplier)


class TokenLosses(torch.autograd.Function):
    """Token losses of all slots, whose gradient is computed in the forward pass.

    Both are computed for a chunk of the scored rows at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, multiplier, softcap, labels, is_scored, token_loss, target_hidden, chunk_bytes):
        """Compute losses, nll, overlap and top tokens of all slots.

        Arguments as in `dpace.loss.frozen_head_nll`.
        """
        head, device, needs_grad = Head(weight, multiplier, softcap), hidden.device, ctx.needs_input_grad[0]
        losses, nll, overlap = (torch.full(is_scored.shape, fill, device=device) for fill in (0.0, 0.0, 1.0))
        top_tokens = torch.full_like(labels, -1)
        grad = torch.zeros_like(hidden) if needs_grad else None
        num_logits = chunk_bytes // 4
        num_rows = math.isqrt(num_logits) if target_hidden is None else num_logits // SOFT_COPIES // len(weight)
        for chosen in is_scored.flatten().nonzero()[:, 0].split(max(1, num_rows)):

            def select(x, chosen=chosen):
                return x.flatten(0, 2)[chosen]

            rows, row_labels = select(hidden), select(labels)[:, None]
            if target_hidden is None:
                scores = _hard_scores(rows, head, row_labels, max(1, num_logits // max(1, len(rows))), needs_grad)
            else:
                scores = _soft_scores(rows, select(target_hidden), head, row_labels, token_loss, needs_grad)
            for values, whole in zip(scores, (losses, nll, overlap, top_tokens, grad), strict=True):
                if values is not None and whole is not None:
                    whole.view(is_scored.numel(), -1)[chosen] = values.to(whole.dtype)
            del scores  # frees memory before the next chunk is computed
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, overlap, top_tokens)
        return losses, nll, overlap, top_tokens

    @staticmethod
    def backward(ctx, grad_losses, *_):
        """Scale the kept gradient by the gradient of each slot's loss."""
        (grad,) = ctx.saved_tensors
        return torch.mul(grad, grad_losses[..., None], out=torch.empty_like(grad)), *[None] * 8


def default_chunk_bytes(weight: Float[Tensor, "vocab hidden"], *, is_soft: bool) -> int:
    """Choose how many bytes of fp32 logits exist at once.

    It is the amount that makes the products fast, but at most an eighth of the free memory.

    Args:
        weight: the head's weight.
        is_soft: whether the loss compares with the target's distribution.
    """
    if weight.is_cuda:
        free = torch.cuda.mem_get_info(weight.device)[0]
        free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    else:
        free = psutil.virtual_memory().available
    wanted = GPU_CHUNK_BYTES if weight.is_cuda else CPU_CHUNK_BYTES
    if is_soft:
        wanted = max(wanted, 4 * SOFT_COPIES * MIN_SOFT_ROWS * len(weight))
    return min(wanted, free // 8)
