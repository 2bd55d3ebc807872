"""Losses of drafted blocks through the target's frozen LM head, without keeping logits, and the named reductions."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.weights import uniform_weights

REDUCTIONS = ("anchors", "batch", "slots", "weights")

TokenLoss = Literal["nll", "kl", "lk"]

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 4 * 2**20, 2**30
"""Of the fp32 logits that exist at once: what a core's cache holds, and what keeps a GPU busy."""
MIN_SOFT_ROWS = 384
"""Soft losses need whole rows of logits; fewer rows make their products slower."""
SOFT_COPIES = 6
"""fp32 tensors of the logits' size that soft losses need."""

_TINY = torch.finfo(torch.float32).tiny


class Slots(NamedTuple):
    """What is known of the slots when they are weighed; all "batch block slot" and detached."""

    is_scored: Tensor
    """Bool: the slot counts."""
    token_probs: Tensor
    """Probability that the drafter gives to the target's token, 1 where not scored."""
    is_match: Tensor
    """Bool: the drafter's greedy choice is the target's token."""
    overlap: Tensor | None
    """Sum over tokens of the smaller of the drafter's and the target's probability, how often speculative sampling accepts the
    slot; 1 where not scored. None without `target_hidden`."""


Weigh = Callable[[Slots], Float[Tensor, "batch block slot"]]


class Head(NamedTuple):
    """The target's frozen LM head: `softcap * tanh(multiplier * hidden @ weight.T / softcap)`.

    The multiplier is 1 and the cap absent in most families (Gemma 2 caps, Granite and Cohere scale).
    """

    weight: Float[Tensor, "vocab hidden"]
    multiplier: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Logits of the given rows, in the dtype of the weight."""
        return self.finish(hidden.to(self.weight.dtype) @ self.weight.T)

    def finish(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Multiplier and cap of plain products with the weight."""
        if self.multiplier != 1:
            logits = logits * self.multiplier
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"] | None:
        """What the cap multiplies the gradient of these logits with; None without a cap."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2


class HeadOutput(NamedTuple):
    """What one pass through the head gives; all but `losses` detached, 0 (`top_tokens`: -1) where a slot is not scored."""

    losses: Float[Tensor, "batch block"]
    """Sum over slots of weight times token loss, in nats; carries the gradient to the hidden states."""
    nll: Float[Tensor, "batch block slot"]
    """Negative log-likelihood of the label, whatever the token loss."""
    weights: Float[Tensor, "batch block slot"]
    top_tokens: Int[Tensor, "batch block slot"]
    """The drafter's greedy choice."""
    is_match: Bool[Tensor, "batch block slot"]
    """Scored, and that choice is the label."""

    @property
    def accepted_lengths(self) -> Int[Tensor, "batch block"]:
        """Draft tokens that greedy verification accepts: the matches from slot 1 to the first miss."""
        return self.is_match[..., 1:].int().cumprod(-1).sum(-1)


class _Scores(NamedTuple):
    """Of rows: all "rows 1", but `grad`, "rows hidden", the gradient of `losses`; None where none is needed."""

    losses: Tensor
    nll: Tensor
    overlap: Tensor | None
    top_tokens: Tensor
    grad: Tensor | None


def _hard_scores(rows: Tensor, head: Head, labels: Tensor, num_columns: int, needs_grad: bool) -> _Scores:
    """Cross-entropy with the labels, `num_columns` tokens of the vocabulary at a time.

    The gradient, `softmax @ W - W[label]`, is attention of the rows over the vocabulary with the head as keys and values, and
    computed as FlashAttention does (arXiv 2205.14135): sums relative to a running maximum, scaled again where it grows. The
    label's own token is left out of the sums, so that the gradient of a sure row does not cancel.
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
        found = logits.gather(-1, column)
        label_logits = torch.where(is_here, found, label_logits)
        slope = head.slope(logits) if needs_grad else None
        logits.scatter_(-1, column, found.masked_fill(is_here, -torch.inf))
        exps = logits.sub_(peak).exp_()
        others.mul_(rescale).add_(exps.sum(-1, keepdim=True))
        if grad is not None:
            exps = exps if slope is None else exps.mul_(slope)
            grad.mul_(rescale).add_(exps.to(weight.dtype) @ part)
    total = others + (label_logits - peak).exp()
    nll = peak + total.log() - label_logits
    if grad is not None:
        slope = head.slope(label_logits)
        short = others / total if slope is None else others / total * slope
        grad = grad.div_(total).addcmul_(short, weight[labels[:, 0]].float(), value=-1).mul_(head.multiplier)
    return _Scores(nll, nll, None, top_tokens, grad)


def _soft_scores(
    rows: Tensor, target_rows: Tensor, head: Head, labels: Tensor, token_loss: TokenLoss, needs_grad: bool
) -> _Scores:
    """The token loss against the target's distribution, and the overlap of the two, which needs whole rows of both."""
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
    else:  # d overlap / d probs is 1 where the drafter falls short of the target, else 0
        losses = -overlap.clamp_min(_TINY).log()
        falls_short = (probs < target_probs).float()
        share = (probs * falls_short).sum(-1, keepdim=True)
        grad = probs.mul_(share - falls_short).div_(overlap.clamp_min(_TINY))
    if not needs_grad:
        return _Scores(losses, nll, overlap, top_tokens, None)
    grad = grad if slope is None else grad.mul_(slope)
    return _Scores(losses, nll, overlap, top_tokens, (grad.to(head.weight.dtype) @ head.weight) * head.multiplier)


class _TokenLosses(torch.autograd.Function):
    """Token losses of all slots, their gradient formed in the forward pass, a chunk of the scored rows at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, multiplier, softcap, labels, is_scored, token_loss, target_hidden, chunk_bytes):
        head, device, needs_grad = Head(weight, multiplier, softcap), hidden.device, ctx.needs_input_grad[0]
        losses, nll, overlap = (torch.full(is_scored.shape, fill, device=device) for fill in (0.0, 0.0, 1.0))
        top_tokens = torch.full_like(labels, -1)
        grad = torch.zeros_like(hidden) if needs_grad else None
        num_logits = chunk_bytes // 4
        num_rows = math.isqrt(num_logits) if target_hidden is None else num_logits // SOFT_COPIES // len(weight)
        for chosen in is_scored.flatten().nonzero()[:, 0].split(max(1, num_rows)):

            def of(x, chosen=chosen):
                return x.flatten(0, 2)[chosen]

            rows, row_labels = of(hidden), of(labels)[:, None]
            if target_hidden is None:
                scores = _hard_scores(rows, head, row_labels, max(1, num_logits // max(1, len(rows))), needs_grad)
            else:
                scores = _soft_scores(rows, of(target_hidden), head, row_labels, token_loss, needs_grad)
            for values, whole in zip(scores, (losses, nll, overlap, top_tokens, grad), strict=True):
                if values is not None and whole is not None:
                    whole.view(is_scored.numel(), -1)[chosen] = values.to(whole.dtype)
            del scores  # before the next chunk's are made
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, overlap, top_tokens)
        return losses, nll, overlap, top_tokens

    @staticmethod
    def backward(ctx, grad_losses, *_):
        (grad,) = ctx.saved_tensors
        return torch.mul(grad, grad_losses[..., None], out=torch.empty_like(grad)), *[None] * 8


def _uniform(slots: Slots) -> Tensor:
    return uniform_weights(slots.is_scored)


def default_chunk_bytes(weight: Float[Tensor, "vocab hidden"], *, is_soft: bool) -> int:
    """Bytes of the fp32 logits that exist at once: what makes products fast, at most an eighth of the free memory.

    Args:
        weight: of the head.
        is_soft: of a loss that looks at the target's distribution.
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


def _check_token_loss(token_loss: TokenLoss, target_hidden: Tensor | None) -> None:
    if token_loss not in ("nll", "kl", "lk"):
        raise ValueError(f"token_loss is {token_loss!r}; choose one of nll, kl, lk")
    if token_loss != "nll" and target_hidden is None:
        raise ValueError(f"token_loss {token_loss!r} compares with the target's distribution and needs target_hidden")


def frozen_head_nll(
    hidden: Float[Tensor, "batch block slot hidden"],
    head: Head,
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
    *,
    weigh: Weigh = _uniform,
    token_loss: TokenLoss = "nll",
    target_hidden: Float[Tensor, "batch block slot hidden"] | None = None,
    chunk_bytes: int | None = None,
) -> HeadOutput:
    """Compute the `weigh`-ted loss per block; equals `frozen_head_nll_reference`.

    The head is frozen, so the gradient of a row's cross-entropy with respect to its hidden state is
    `(softmax - onehot) @ W`, and is formed together with its value: tile by tile of rows and vocabulary, logits, running sums,
    gradient, then the logits are dropped. That makes two products with the head in all; no logits are kept and none recomputed,
    and rows that are not scored are never multiplied. The weights come after: they scale the rows' gradients. With
    `target_hidden`, the target's logits are computed too, a third product, and tiles are whole rows. Statistics are fp32
    whatever the dtype of the operands.

    With `q` the drafter's and `p` the target's distribution at a slot, its token loss is

    - `nll`: `-log q[label]`, the paper's;
    - `kl`: `sum of p log(p / q)`, soft labels;
    - `lk`: `-log sum of min(p, q)`, the negative log of what speculative sampling accepts (LK, arXiv 2602.23881).

    Memory: `chunk_bytes`, and two gradients of the size of `hidden`; nothing grows with rows x vocabulary.

    Args:
        hidden: the drafter's final hidden states.
        head: the frozen head; no gradient reaches it.
        labels: the target's token at each slot; ignored where not scored.
        is_scored: slots that count.
        weigh: what is known of the slots to weights, see `dpace.weights`; called once, its result detached.
        token_loss: `nll`, `kl` or `lk`.
        target_hidden: what the target's own head reads where it predicts each slot; for `kl`, `lk` and `Slots.overlap`.
        chunk_bytes: of the logits that exist at once; by default `default_chunk_bytes`. Results do not depend on it but for
            rounding.

    Returns:
        See `HeadOutput`. Without a gradient to compute (`torch.no_grad`), the product for the gradient is not made.

    Raises:
        ValueError: unknown `token_loss`, or one that needs `target_hidden`.
    """
    _check_token_loss(token_loss, target_hidden)
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(head.weight, is_soft=target_hidden is not None)
    # Outside of torch.compile's graphs: rows are chosen by a mask, which would recompile for every new count of them.
    apply: Any = torch.compiler.disable(_TokenLosses.apply)
    losses, nll, overlap, top_tokens = apply(hidden, *head, labels, is_scored, token_loss, target_hidden, chunk_bytes)
    return _weighted(losses, nll, None if target_hidden is None else overlap, top_tokens, labels, is_scored, weigh)


def _weighted(losses, nll, overlap, top_tokens, labels, is_scored, weigh: Weigh) -> HeadOutput:
    """Weigh the slots' token losses."""
    is_match = (top_tokens == labels) & is_scored
    weights = weigh(Slots(is_scored, torch.exp(-nll), is_match, overlap)).detach().float()
    return HeadOutput((weights * losses).sum(-1), nll, weights, top_tokens, is_match)


def frozen_head_nll_reference(
    hidden: Float[Tensor, "batch block slot hidden"],
    head: Head,
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
    *,
    weigh: Weigh = _uniform,
    token_loss: TokenLoss = "nll",
    target_hidden: Float[Tensor, "batch block slot hidden"] | None = None,
) -> HeadOutput:
    """Do what `frozen_head_nll` does, plainly: all logits at once, gradient by autograd. For tests and for reading."""
    _check_token_loss(token_loss, target_hidden)
    logits = head.logits(hidden).float()
    labels = labels.where(is_scored, 0)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    nll = nll.view(labels.shape).where(is_scored, 0.0)
    losses, overlap = nll, None
    if target_hidden is not None:
        log_q, log_p = logits.log_softmax(-1), head.logits(target_hidden).float().log_softmax(-1)
        accepted = torch.minimum(log_q.exp(), log_p.exp()).sum(-1)
        overlap = accepted.detach().where(is_scored, 1.0)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        losses = {"nll": nll, "kl": kl, "lk": -accepted.log()}[token_loss].where(is_scored, 0.0)
    top_tokens = logits.argmax(-1).where(is_scored, -1)
    return _weighted(losses, nll.detach(), overlap, top_tokens, labels, is_scored, weigh)


def count_items(is_scored: Bool[Tensor, "batch block slot"], reduction: str) -> Int[Tensor, ""]:
    """Count what a reduction divides by: sequences for `batch`, sequences with an anchor for `anchors`, slots for `slots`.

    Raises:
        ValueError: unknown reduction, or `weights`, which divides by the sum of `HeadOutput.weights`.
    """
    if reduction == "batch":
        return torch.tensor(len(is_scored), device=is_scored.device)
    if reduction == "anchors":
        return is_scored.flatten(1).any(-1).sum()
    if reduction == "slots":
        return is_scored.sum()
    if reduction == "weights":
        raise ValueError("the reduction `weights` divides by the sum of the weights, known only after the forward pass")
    raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")


def block_loss(
    losses: Float[Tensor, "batch block"],
    is_scored: Bool[Tensor, "batch block slot"],
    *,
    reduction: str = "anchors",
    num_items: Int[Tensor, ""] | Float[Tensor, ""] | int | None = None,
) -> Float[Tensor, ""]:
    """Reduce the losses of blocks to the scalar that is trained on.

    With `l[b, n]` the weighted loss of block `n` of sequence `b`, `A[b]` the number of its blocks with a scored slot, and sums
    over everything that makes one optimizer step:

    - `anchors`: `sum over b of (sum over n of l[b, n]) / A[b] / sequences with an anchor`. Every sequence counts the same
      (SpecForge since #848).
    - `batch`: `sum of l / sequences` (the paper's code, and SpecForge of its time).
    - `slots`: `sum of l / scored slots` (speculators).
    - `weights`: `sum of l / sum of weights`, a weighted mean (TorchSpec, Model-Optimizer, SpecForge's DFlash path). It divides
      D-PACE's growth with confidence out again.

    Args:
        losses: from `frozen_head_nll`.
        is_scored: slots that count.
        reduction: one of these.
        num_items: `count_items` summed over the whole step (all ranks, all accumulated micro-batches), for `weights` the sum of
            `HeadOutput.weights`; then the sum of the results, however it was split, is the loss of the whole. By default that
            of this batch alone, which `weights` does not know.

    Returns:
        A scalar in nats, 0 (with a zero gradient) for a batch without a scored slot.

    Raises:
        ValueError: unknown reduction, or `weights` without `num_items`.
    """
    if num_items is None:
        num_items = count_items(is_scored, reduction)
    elif reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    if reduction == "anchors":
        losses = losses / is_scored.any(-1).sum(-1, keepdim=True).clamp_min(1)
    return losses.sum() / torch.as_tensor(num_items, device=losses.device).float().clamp_min(_TINY)
