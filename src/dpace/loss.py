"""Cross-entropy of drafted blocks through the target's frozen LM head, without keeping logits, and the named reductions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.weights import uniform_weights

Weigh = Callable[
    [Float[Tensor, "batch block slot"], Bool[Tensor, "batch block slot"]], Float[Tensor, "batch block slot"]
]

REDUCTIONS = ("anchors", "batch", "slots")

CHUNK_BYTES = 128 * 2**20
"""Size of the fp32 logits that exist at once when `chunk_rows` is not given."""


class Head(NamedTuple):
    """The target's frozen LM head: `softcap * tanh(multiplier * hidden @ weight.T / softcap)`.

    The multiplier is 1 and the cap absent in most families (Gemma 2 caps, Granite and Cohere scale).
    """

    weight: Float[Tensor, "vocab hidden"]
    multiplier: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Logits of the given rows, in the dtype of the weight."""
        logits = hidden.to(self.weight.dtype) @ self.weight.T
        if self.multiplier != 1:
            logits = logits * self.multiplier
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HeadOutput(NamedTuple):
    """What one pass through the head gives; all but `losses` detached, 0 (`top_tokens`: -1) where a slot is not scored."""

    losses: Float[Tensor, "batch block"]
    """Sum over slots of weight times nll, in nats; carries the gradient to the hidden states."""
    nll: Float[Tensor, "batch block slot"]
    weights: Float[Tensor, "batch block slot"]
    top_tokens: Int[Tensor, "batch block slot"]
    """The drafter's greedy choice."""


class _FrozenHeadNll(torch.autograd.Function):
    """The gradient is formed in the forward pass: `weight * (softmax - onehot) @ W`, one chunk of blocks at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, multiplier, softcap, labels, is_scored, weigh, chunk_rows):
        batch, num_blocks, num_slots, _ = hidden.shape
        hidden, labels, is_scored = (x.flatten(0, 1) for x in (hidden, labels, is_scored))
        head = Head(weight, multiplier, softcap)
        nll, weights = (torch.zeros(is_scored.shape, device=hidden.device) for _ in range(2))
        top_tokens = torch.full_like(labels, -1)
        has_grad = ctx.needs_input_grad[0]
        grad = torch.zeros_like(hidden) if has_grad else None
        blocks_per_chunk = max(1, chunk_rows // max(1, num_slots - 1))
        for start in range(0, len(hidden), blocks_per_chunk):
            chunk = slice(start, start + blocks_per_chunk)
            scored = is_scored[chunk]
            rows, row_labels = hidden[chunk][scored], labels[chunk][scored, None]
            if not len(rows):
                continue
            logits = head.logits(rows).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            nll[chunk] = nll[chunk].masked_scatter(scored, log_sum - logits.gather(-1, row_labels))
            top_tokens[chunk] = top_tokens[chunk].masked_scatter(scored, logits.argmax(-1))
            weights[chunk] = weigh(torch.exp(-nll[chunk])[None], scored[None])[0].float()
            if grad is None:
                continue
            cap_slope = None if softcap is None else 1 - (logits / softcap) ** 2
            row_weights = multiplier * weights[chunk][scored, None]
            logits.sub_(log_sum).exp_().mul_(row_weights).scatter_add_(-1, row_labels, -row_weights)
            if cap_slope is not None:
                logits.mul_(cap_slope)
            grad[chunk] = grad[chunk].masked_scatter(
                scored[..., None], (logits.to(weight.dtype) @ weight).to(grad.dtype)
            )
        ctx.save_for_backward(grad)
        shape = (batch, num_blocks, num_slots)
        ctx.grad_shape = (*shape, hidden.shape[-1])
        nll, weights, top_tokens = (x.view(shape) for x in (nll, weights, top_tokens))
        ctx.mark_non_differentiable(nll, weights, top_tokens)
        return (weights * nll).sum(-1), nll, weights, top_tokens

    @staticmethod
    def backward(ctx, grad_losses, *_):
        (grad,) = ctx.saved_tensors
        grad = grad.view(ctx.grad_shape) * grad_losses[..., None, None].to(grad.dtype)
        return grad, None, None, None, None, None, None, None


def _uniform(token_probs: Float[Tensor, "batch block slot"], is_scored: Bool[Tensor, "batch block slot"]):
    return uniform_weights(is_scored)


def frozen_head_nll(
    hidden: Float[Tensor, "batch block slot hidden"],
    head: Head,
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
    *,
    weigh: Weigh = _uniform,
    chunk_rows: int | None = None,
) -> HeadOutput:
    """Compute `weigh`-ted cross-entropy per block; equals `frozen_head_nll_reference`.

    The head is frozen, so the gradient of a row's loss with respect to its hidden state is `weight * (softmax - onehot) @ W`.
    Blocks pass through in chunks: logits, nll, weights, gradient, then the logits are dropped. That makes two products with
    the head in all; no logits are kept and none recomputed, and rows that are not scored are never multiplied. Statistics
    are fp32 whatever the dtype of the operands.

    Memory: O(chunk_rows x vocab) fp32 plus one gradient of the size of `hidden`.

    Args:
        hidden: the drafter's final hidden states.
        head: the frozen head; no gradient reaches it.
        labels: the target's token at each slot; ignored where not scored.
        is_scored: slots that count.
        weigh: token probabilities and `is_scored` to weights, see `dpace.weights`; called for whole blocks, without gradient.
        chunk_rows: rows whose logits exist at once; by default as many as fit in `CHUNK_BYTES`.

    Returns:
        See `HeadOutput`. Without a gradient to compute (`torch.no_grad`), only one product is made.
    """
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    return HeadOutput(*_FrozenHeadNll.apply(hidden, *head, labels, is_scored, weigh, chunk_rows))


def frozen_head_nll_reference(
    hidden: Float[Tensor, "batch block slot hidden"],
    head: Head,
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
    *,
    weigh: Weigh = _uniform,
) -> HeadOutput:
    """Do what `frozen_head_nll` does, plainly: all logits at once, gradient by autograd. For tests and for reading."""
    logits = head.logits(hidden).float()
    labels = labels.where(is_scored, 0)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    nll = nll.view(labels.shape).where(is_scored, 0.0)
    weights = weigh(torch.exp(-nll.detach()), is_scored).float()
    top_tokens = logits.argmax(-1).where(is_scored, -1)
    return HeadOutput((weights * nll).sum(-1), nll.detach(), weights, top_tokens)


def count_items(is_scored: Bool[Tensor, "batch block slot"], reduction: str) -> Int[Tensor, ""]:
    """Count what a reduction divides by: sequences for `batch`, sequences with an anchor for `anchors`, slots for `slots`."""
    if reduction == "batch":
        return torch.tensor(len(is_scored), device=is_scored.device)
    if reduction == "anchors":
        return is_scored.flatten(1).any(-1).sum()
    if reduction == "slots":
        return is_scored.sum()
    raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")


def block_loss(
    losses: Float[Tensor, "batch block"],
    is_scored: Bool[Tensor, "batch block slot"],
    *,
    reduction: str = "anchors",
    num_items: Int[Tensor, ""] | Float[Tensor, ""] | int | None = None,
) -> Float[Tensor, ""]:
    """Reduce the losses of blocks to the scalar that is trained on.

    With `l[b, n]` the weighted loss of block `n` of sequence `b` and `A[b]` the number of its blocks with a scored slot:
    `anchors` is the mean over sequences of `sum over n of l[b, n] / A[b]` (every sequence counts the same; SpecForge since
    #848), `batch` is `sum of l / sequences` (the paper's code), `slots` is `sum of l / scored slots` (speculators).

    Args:
        losses: from `frozen_head_nll`.
        is_scored: slots that count.
        reduction: `anchors`, `batch` or `slots`.
        num_items: `count_items` summed over everything that makes one optimizer step (all ranks, all accumulated
            micro-batches); then the sum of the results, however it was split, is the loss of the whole. By default this
            batch alone.

    Returns:
        A scalar in nats, 0 (with a zero gradient) for a batch without a scored slot.

    Raises:
        ValueError: unknown reduction.
    """
    if num_items is None:
        num_items = count_items(is_scored, reduction)
    if reduction == "anchors":
        losses = losses / is_scored.any(-1).sum(-1, keepdim=True).clamp_min(1)
    return losses.sum() / torch.as_tensor(num_items, device=losses.device).clamp_min(1)
