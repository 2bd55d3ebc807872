"""Losses of drafted blocks through the target's frozen LM head, without keeping logits, and the named reductions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.weights import uniform_weights

REDUCTIONS = ("anchors", "batch", "slots", "weights")

TokenLoss = Literal["nll", "kl", "lk"]

MIN_CHUNK_ROWS = 384
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 32 * 2**20, 2**30
"""A chunk of fp32 logits has this size, or those rows where that is more: fewer rows make the two products slower."""


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
    """Of rows: all "rows 1", but `grad`, which times `grad_scale` is the gradient of `losses` with respect to the logits."""

    losses: Tensor
    nll: Tensor
    overlap: Tensor | None
    top_tokens: Tensor
    grad: Tensor
    grad_scale: Tensor


def _hard_scores(logits: Tensor, labels: Tensor) -> _Scores:
    """Cross-entropy with the labels; `logits` is overwritten, exp is taken once, and no second tensor of its size is made."""
    peak, top_tokens = logits.max(-1, keepdim=True)
    label_logits = logits.gather(-1, labels)
    grad = logits.sub_(peak).exp_()
    total = grad.sum(-1, keepdim=True)
    nll = peak + total.log() - label_logits
    grad.scatter_add_(-1, labels, -total)
    return _Scores(nll, nll, None, top_tokens, grad, 1 / total)


def _soft_scores(logits: Tensor, target_logits: Tensor, labels: Tensor, token_loss: TokenLoss) -> _Scores:
    """The token loss against the target's distribution, and the overlap of the two."""
    log_probs, log_target = logits.log_softmax(-1), target_logits.log_softmax(-1)
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
    return _Scores(losses, nll, overlap, top_tokens, grad, torch.ones_like(nll))


class _FrozenHeadNll(torch.autograd.Function):
    """The gradient is formed in the forward pass, one chunk of blocks at a time."""

    @staticmethod
    def forward(
        ctx, hidden, weight, multiplier, softcap, labels, is_scored, weigh, token_loss, target_hidden, chunk_rows
    ):
        shape, head = hidden.shape[:3], Head(weight, multiplier, softcap)
        hidden, labels, is_scored = (x.flatten(0, 1) for x in (hidden, labels, is_scored))
        losses, nll, weights = (torch.zeros(is_scored.shape, device=hidden.device) for _ in range(3))
        top_tokens = torch.full_like(labels, -1)
        has_grad = ctx.needs_input_grad[0]
        grad = torch.zeros_like(hidden) if has_grad else None
        blocks_per_chunk = max(1, chunk_rows // max(1, shape[2] - 1))
        for start in range(0, len(hidden), blocks_per_chunk):
            chunk = slice(start, start + blocks_per_chunk)
            scored = is_scored[chunk]
            rows, row_labels = hidden[chunk][scored], labels[chunk][scored, None]
            if not len(rows):
                continue
            logits = head.logits(rows).float()
            cap_slope = None if softcap is None or not has_grad else 1 - (logits / softcap) ** 2
            if target_hidden is None:
                scores = _hard_scores(logits, row_labels)
            else:
                target_logits = head.logits(target_hidden.flatten(0, 1)[chunk][scored]).float()
                scores = _soft_scores(logits, target_logits, row_labels, token_loss)

            def spread(values, empty, scored=scored):
                return torch.full_like(scored, empty, dtype=values.dtype).masked_scatter(scored, values)

            losses[chunk], nll[chunk] = spread(scores.losses, 0), spread(scores.nll, 0)
            top_tokens[chunk] = spread(scores.top_tokens, -1)
            seen = Slots(
                scored[None],
                torch.exp(-nll[chunk])[None],
                (top_tokens[chunk] == labels[chunk])[None] & scored[None],
                None if scores.overlap is None else spread(scores.overlap, 1)[None],
            )
            weights[chunk] = weigh(seen)[0].float()
            if grad is not None:
                scores.grad.mul_(multiplier * weights[chunk][scored, None] * scores.grad_scale)
                if cap_slope is not None:
                    scores.grad.mul_(cap_slope)
                row_grad = (scores.grad.to(weight.dtype) @ weight).to(grad.dtype)
                grad[chunk] = grad[chunk].masked_scatter(scored[..., None], row_grad)
            del logits, scores, cap_slope  # before the next chunk's are made
        ctx.save_for_backward(grad)
        ctx.grad_shape = (*shape, hidden.shape[-1])
        is_match = (top_tokens == labels) & is_scored
        rest = [x.view(shape) for x in (nll, weights, top_tokens, is_match)]
        ctx.mark_non_differentiable(*rest)
        return (weights * losses).sum(-1).view(shape[:2]), *rest

    @staticmethod
    def backward(ctx, grad_losses, *_):
        (grad,) = ctx.saved_tensors
        grad = grad.view(ctx.grad_shape) * grad_losses[..., None, None].to(grad.dtype)
        return grad, *[None] * 9


def _uniform(slots: Slots) -> Tensor:
    return uniform_weights(slots.is_scored)


def default_chunk_rows(weight: Float[Tensor, "vocab hidden"], *, num_copies: int = 1) -> int:
    """Rows whose logits exist at once: enough for fast products, in at most an eighth of the free memory.

    Args:
        weight: of the head.
        num_copies: fp32 tensors of the logits' size that a chunk needs.
    """
    if weight.is_cuda:
        free = torch.cuda.mem_get_info(weight.device)[0]
        free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    else:
        free = psutil.virtual_memory().available
    row_bytes = 4 * num_copies * len(weight)
    wanted = max(MIN_CHUNK_ROWS, (GPU_CHUNK_BYTES if weight.is_cuda else CPU_CHUNK_BYTES) // row_bytes)
    return max(1, min(wanted, free // 8 // row_bytes))


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
    chunk_rows: int | None = None,
) -> HeadOutput:
    """Compute the `weigh`-ted loss per block; equals `frozen_head_nll_reference`.

    The head is frozen, so the gradient of a row's cross-entropy with respect to its hidden state is
    `weight * (softmax - onehot) @ W`. Blocks pass through in chunks: logits, nll, weights, gradient, then the logits are
    dropped. That makes two products with the head in all; no logits are kept and none recomputed, and rows that are not scored
    are never multiplied. With `target_hidden`, the target's logits are recomputed chunk by chunk, a third product. Statistics
    are fp32 whatever the dtype of the operands.

    With `q` the drafter's and `p` the target's distribution at a slot, its token loss is

    - `nll`: `-log q[label]`, the paper's;
    - `kl`: `sum of p log(p / q)`, soft labels;
    - `lk`: `-log sum of min(p, q)`, the negative log of what speculative sampling accepts (LK, arXiv 2602.23881).

    Memory: O(chunk_rows x vocab) fp32 plus one gradient of the size of `hidden`.

    Args:
        hidden: the drafter's final hidden states.
        head: the frozen head; no gradient reaches it.
        labels: the target's token at each slot; ignored where not scored.
        is_scored: slots that count.
        weigh: what is known of the slots to weights, see `dpace.weights`; called for whole blocks, without gradient.
        token_loss: `nll`, `kl` or `lk`.
        target_hidden: what the target's own head reads where it predicts each slot; for `kl`, `lk` and `Slots.overlap`.
        chunk_rows: rows whose logits exist at once; by default what fits in a fixed amount, or in an eighth of the free memory
            where that is less. Results do not depend on it but for rounding.

    Returns:
        See `HeadOutput`. Without a gradient to compute (`torch.no_grad`), the product for the gradient is not made.

    Raises:
        ValueError: unknown `token_loss`, or one that needs `target_hidden`.
    """
    _check_token_loss(token_loss, target_hidden)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(head.weight, num_copies=1 if target_hidden is None else 6)
    # Outside of torch.compile's graphs: rows are chosen by a mask, which would recompile for every new count of them.
    apply: Any = torch.compiler.disable(_FrozenHeadNll.apply)
    return HeadOutput(*apply(hidden, *head, labels, is_scored, weigh, token_loss, target_hidden, chunk_rows))


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
    is_match = (top_tokens == labels) & is_scored
    weights = weigh(Slots(is_scored, torch.exp(-nll.detach()), is_match, overlap)).float()
    return HeadOutput((weights * losses).sum(-1), nll.detach(), weights, top_tokens, is_match)


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
