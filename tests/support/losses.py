"""The losses of `dpace.loss` in plain PyTorch, which the fast code is compared with."""

import torch
from torch import Tensor

from dpace.config import TokenLoss
from dpace.loss import Slots, SlotScores, Weigh
from dpace.target.head import LmHead


def soft_losses(log_probs: Tensor, log_target: Tensor, token_loss: TokenLoss) -> Tensor:
    """The token loss of a drafter's log-probabilities against the target's."""
    if token_loss == "kl":
        return (log_target.exp() * (log_target - log_probs)).sum(-1)
    assert token_loss == "lk"
    return -torch.minimum(log_probs.exp(), log_target.exp()).sum(-1).log()


def frozen_head_nll_reference(
    hidden: Tensor,
    head: LmHead,
    labels: Tensor,
    is_scored: Tensor,
    *,
    weigh: Weigh = lambda slots: slots.is_scored.float(),
    token_loss: TokenLoss = "nll",
    target_hidden: Tensor | None = None,
    num_candidates: int = 1,
) -> SlotScores:
    """What `frozen_head_nll` gives: from all logits at once, with the gradient of autograd."""
    logits = head.logits(hidden).float()  # (batch, block, slot, vocab)
    log_probs = logits.log_softmax(-1)
    # A label that is not scored may be no row of the head, so row 0 stands for it.
    labels_or_0 = labels.where(is_scored, 0)[..., None]
    nll = -log_probs.gather(-1, labels_or_0)[..., 0].where(is_scored, 0.0)
    losses = nll
    overlap = None
    if target_hidden is not None:
        log_target = head.logits(target_hidden).float().log_softmax(-1)
        overlap = torch.minimum(log_probs.exp(), log_target.exp()).sum(-1).detach().where(is_scored, 1.0)
        if token_loss != "nll":
            losses = soft_losses(log_probs, log_target, token_loss).where(is_scored, 0.0)
    candidates = logits.topk(num_candidates).indices.where(is_scored[..., None], -1)
    is_match = (candidates[..., 0] == labels) & is_scored
    weights = weigh(Slots(is_scored, nll.detach().neg().exp(), is_match, overlap))
    return SlotScores((weights * losses).sum(-1), nll.detach(), weights, is_match, losses, candidates)
