"""Losses of drafted blocks through the target's frozen LM head, and their reductions.

No logits are kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.config import Reduction, TokenLoss
from dpace.loss.head_scores import CPU_CHUNK_BYTES, score_tokens
from dpace.target.head import LmHead
from dpace.weights import uniform_weights


class Slots(NamedTuple):
    """Facts about the slots that their weights are computed from.

    All are detached, and "batch block slot" where nothing else is said.
    """

    is_scored: Tensor
    """Bool: the slot counts."""
    token_probs: Tensor
    """Probability that the drafter gives to the target's token; 1 where not scored."""
    is_match: Tensor
    """Bool: the drafter's greedy choice is the target's token."""
    overlap: Tensor | None
    """Sum over tokens of the smaller of the drafter's and the target's probability; 1 where not scored.

    This is how often speculative sampling accepts the slot. None without `target_hidden`.
    """
    progress: float = 0.0
    """Share of the training that is done, 0 to 1."""


Weigh = Callable[[Slots], Float[Tensor, "batch block slot"]]


class SlotScores(NamedTuple):
    """Losses and statistics from one pass through the head.

    Numbers are fp32 for operands of any dtype. All but the losses are detached. Values are 0 where a slot is not scored
    and nothing else is said.
    """

    losses: Float[Tensor, "batch block"]
    """Sum over slots of weight times token loss, in nats; carries the gradient to the hidden states."""
    nll: Float[Tensor, "batch block slot"]
    """Negative log-likelihood of the label, whatever the token loss."""
    weights: Float[Tensor, "batch block slot"]
    is_match: Bool[Tensor, "batch block slot"]
    """Whether the slot is scored and the drafter's greedy choice is the label."""
    token_losses: Float[Tensor, "batch block slot"]
    """Losses before they are weighed; they carry the gradient too."""
    candidates: Int[Tensor, "batch block slot candidate"]
    """The drafter's best tokens, best first; -1 where not scored."""


def frozen_head_nll(
    hidden: Float[Tensor, "batch block slot hidden"],
    head: LmHead,
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
    *,
    weigh: Weigh = lambda slots: uniform_weights(slots.is_scored),
    token_loss: TokenLoss = "nll",
    target_hidden: Float[Tensor, "batch block slot hidden"] | None = None,
    scored_rows: Int[Tensor, " row"] | None = None,
    chunk_bytes: int = CPU_CHUNK_BYTES,
    num_candidates: int = 1,
) -> SlotScores:
    """Compute the weighted loss of each block.

    With `q` the drafter's distribution and `p` the target's, a token loss is `-log q[label]` (`nll`), `sum of p log(p /
    q)` (`kl`) or `-log sum of min(p, q)` (`lk`). `dpace.loss.head_scores` says how they are computed, in which memory.

    Args:
        hidden: the drafter's final hidden states.
        head: the frozen head.
        labels: the target's token at each slot; ignored where not scored.
        is_scored: slots that count.
        weigh: computes weights from `Slots`, see `dpace.weights`; called once, its result detached.
        token_loss: see above.
        target_hidden: input of the target's own head where it predicts each slot; `nll` without `Slots.overlap` needs
            none.
        scored_rows: numbers of the scored slots in `is_scored.flatten()`, where they are known; to find them, the host
            waits for the device.
        chunk_bytes: size of the fp32 logits that exist at once, see `chunk_bytes_of`; changes results by rounding only.
        num_candidates: number of best tokens to find, exactly; 1 with `target_hidden`.

    Raises:
        ValueError: a `token_loss` that needs `target_hidden`, without it.
    """
    if token_loss != "nll" and target_hidden is None:
        raise ValueError(f"token_loss {token_loss!r} compares with the target's distribution and needs target_hidden")
    if scored_rows is None:
        scored_rows = is_scored.flatten().nonzero()[:, 0]
    losses, nll, overlap, candidates, _ = score_tokens(
        hidden,
        head,
        labels,
        is_scored,
        scored_rows,
        token_loss=token_loss,
        target_hidden=target_hidden,
        chunk_bytes=chunk_bytes,
        num_candidates=num_candidates,
    )
    is_match = (candidates[..., 0] == labels) & is_scored
    # Detached: weights depend on the drafter's probabilities, but are constants of the loss.
    weights = weigh(Slots(is_scored, torch.exp(-nll), is_match, overlap)).detach().float()
    return SlotScores((weights * losses).sum(-1), nll, weights, is_match, losses, candidates)


def candidate_logits(
    hidden: Float[Tensor, "*rows hidden"], head: LmHead, candidates: Int[Tensor, "*rows candidate"]
) -> Float[Tensor, "*rows candidate"]:
    """Compute the logits of a few tokens of each row, in fp32 and with the gradient to the hidden states.

    Memory: the head's rows of all these tokens.
    """
    rows = head.weight[candidates].float()  # (..., candidate, hidden)
    return head.finish((rows @ hidden.float()[..., None])[..., 0])


def block_loss(
    losses: Float[Tensor, "batch block"],
    is_scored: Bool[Tensor, "batch block slot"],
    weights: Float[Tensor, "batch block slot"],
    *,
    reduction: Reduction = "anchors",
) -> tuple[Float[Tensor, ""], Int[Tensor, ""] | Float[Tensor, ""]]:
    """Reduce the losses of blocks to a sum, and count the items that divide it.

    Training minimizes the first over the second, both summed over all data of an optimizer step: over all ranks and
    accumulated micro-batches. So the loss does not depend on how the step is split. `l[b, n]` is the weighted loss of
    block `n` of sequence `b`, and `A[b]` the number of its blocks with a scored slot.

    - `anchors`: `sum over b of (sum over n of l[b, n]) / A[b] / sequences with an anchor`. Every sequence counts the
      same (SpecForge since #848).
    - `batch`: `sum of l / sequences` (the paper's code, and SpecForge at that time).
    - `slots`: `sum of l / scored slots` (speculators).
    - `weights`: `sum of l / sum of weights`, a weighted mean (TorchSpec, Model-Optimizer, SpecForge's DFlash path). It
      cancels the growth of D-PACE's weights with confidence.

    Args:
        losses: from `frozen_head_nll`.
        is_scored: slots that count.
        weights: from `frozen_head_nll`.
        reduction: one of the names above.

    Returns:
        The sum in nats, with the gradient; and the number of items, which may be 0.
    """
    if reduction == "batch":
        return losses.sum(), torch.tensor(len(is_scored), device=is_scored.device)
    if reduction == "slots":
        return losses.sum(), is_scored.sum()
    if reduction == "weights":
        return losses.sum(), weights.sum()
    # (batch, 1): blocks of each sequence that have a scored slot.
    num_blocks = is_scored.any(-1).sum(-1, keepdim=True)
    return (losses / num_blocks.clamp_min(1)).sum(), (num_blocks > 0).sum()
