"""Drafts: each slot's own best tokens, or a walk through the lattice of a head, and the head's loss.

What comes in are hidden states of blocks; what goes out are draft tokens, or what training adds to the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpace.drafter.vocabulary import DraftHead
from dpace.target import Target

CE_WEIGHT = 0.25
"""Weight of a head's cross-entropy beside the loss of the blocks, as published."""


class Lattice(NamedTuple):
    """A head's scores of the candidates of each slot; a walk through it, from slot to slot, is a draft.

    A score after a token says nothing about the token itself: no logit of the drafter is added.
    """

    candidates: Int[Tensor, "batch draft choice"]
    """Tokens, the drafter's best first."""
    start: Float[Tensor, "batch choice"]
    """Scores of the first slot's candidates."""
    pairs: Float[Tensor, "batch pair choice choice"]
    """Scores of a slot's candidates after each of the slot's before."""
    log_odds: Float[Tensor, "batch draft"]
    """Logarithm of the odds that a slot's token is a candidate, in the drafter's softmax."""


class Draft(NamedTuple):
    """What a drafter proposes behind each text."""

    tokens: Int[Tensor, "batch draft"]
    """The best token of each slot."""
    scores: Float[Tensor, "batch draft choice"]
    """Logits of each slot's choices, of which the token is the best; with a head, see `take_walk`."""
    lattice: Lattice | None = None
    """The scores that a head walked by; None without a head."""


def propose(
    drafter: Any,
    head: DraftHead,
    hidden: Float[Tensor, "batch slot hidden"],
    newest: Callable[[], Float[Tensor, "batch feature"]],
    width: int,
) -> Draft:
    """Make a proposal of `width - 1` tokens.

    A drafter's head walks through the lattice of all slots, as in training, and the first tokens are taken.

    Args:
        drafter: whose network computed the hidden states.
        head: for drafts.
        hidden: of whole blocks.
        newest: returns the features of the token before each anchor.
        width: number of slots that may be verified, the anchor included.
    """
    has_head = drafter.lilicorr is not None
    states = hidden[:, 1:] if has_head else hidden[:, 1:width]
    logits = head.logits(states.flatten(0, 1))
    if not has_head:
        tokens = head.tokens(logits.float().argmax(-1)).unflatten(0, (len(hidden), -1))
        return Draft(tokens, logits.unflatten(0, tokens.shape))
    logits = logits.float()
    top, index = logits.topk(drafter.num_candidates)
    log_probs = (top - logits.logsumexp(-1, keepdim=True)).unflatten(0, states.shape[:2])
    candidates = head.tokens(index).view(log_probs.shape)
    lattice = make_lattice(drafter, head.target, candidates, log_probs, states, newest())
    tokens, scores = take_walk(lattice)
    return Draft(tokens[:, : width - 1], scores[:, : width - 1], lattice)


def take_walk(lattice: Lattice) -> tuple[Int[Tensor, "batch draft"], Float[Tensor, "batch draft choice_or_rest"]]:
    """Take the best candidate of each slot after that of the slot before; on ties the drafter's better one.

    Returns:
        The tokens; and the scores that each was the best of, with a last one for all tokens that are no candidates: in
        the softmax it has the share that the drafter gives them.
    """
    best = lattice.pairs.argmax(-1)
    taken = [lattice.start.argmax(-1, keepdim=True)]
    for pair in best.unbind(1):
        taken.append(pair.gather(1, taken[-1]))
    index = torch.cat(taken, dim=1)
    scores = rows_after(lattice, index)
    rest = scores.logsumexp(-1) - lattice.log_odds
    return lattice.candidates.gather(-1, index[..., None])[..., 0], torch.cat([scores, rest[..., None]], dim=-1)


def rows_after(lattice: Lattice, index: Int[Tensor, "batch draft"]) -> Float[Tensor, "batch draft choice"]:
    """Return the scores of each slot's candidates after the candidates `index` of the slots before."""
    pairs = lattice.pairs
    chosen = index[:, : pairs.shape[1], None, None].expand(-1, -1, 1, pairs.shape[-1])
    return torch.cat([lattice.start[:, None], pairs.gather(2, chosen)[:, :, 0]], dim=1)


def make_lattice(
    network: Any,
    target: Target,
    candidates: Int[Tensor, "block draft choice"],
    log_probs: Float[Tensor, "block draft choice"],
    hidden: Float[Tensor, "block draft hidden"],
    features: Float[Tensor, "block feature"],
    has_anchor: Bool[Tensor, " block"] | None = None,
) -> Lattice:
    """Score the candidates of blocks with the network's head.

    Args:
        network: of the drafter.
        target: has the embedding.
        candidates: best tokens of each slot.
        log_probs: theirs in the drafter's softmax, at temperature 1, in fp32.
        hidden: final hidden states of the slots.
        features: of the token before each anchor.
        has_anchor: whether there is such a token; by default there is.
    """
    anchor = network.anchor_rows(features)
    start, pairs = network.lilicorr(target.embed(candidates), log_probs, hidden, anchor, has_anchor)
    return Lattice(candidates, start, pairs, log_probs.detach().exp().sum(-1).logit(eps=1e-6))


class WalkLosses(NamedTuple):
    """What a lattice is trained with, where the token before each slot is the target's own."""

    losses: Float[Tensor, "block draft"]
    """Cross-entropy and penalty, each times its weight; carries the gradient."""
    probs: Float[Tensor, "block draft"]
    """Probability of the target's token, detached; 0 where it cannot be taken."""
    is_candidate: Bool[Tensor, "block draft"]
    """Whether the target's token is a candidate."""


def walk_losses(
    lattice: Lattice,
    labels: Int[Tensor, "block draft"],
    target_logits: Float[Tensor, "block draft choice"] | None,
    penalty: float,
) -> WalkLosses:
    """Compute the loss of a walk that takes the target's tokens.

    With `r` the softmax of a slot's scores after the target's token before, it is `CE_WEIGHT * -log r[true]`, and
    `penalty` times `sum of r[j] * max(0, l[true] - l[j])`, where `l` are the target's logits: a wrong choice costs as
    much as the target dislikes it. A token that is no candidate is not put among them: its slot, and the one behind it,
    have no loss.

    Args:
        lattice: of whole blocks.
        labels: the target's tokens, as the lattice names its candidates.
        target_logits: the target's, of the candidates, without gradient; None without penalty.
        penalty: its weight.

    Source: LiLiCorr (arXiv 2608.20530), as in NVIDIA's Model-Optimizer.
    """
    is_true = lattice.candidates == labels[..., None]
    is_candidate = is_true.any(-1)
    index = is_true.int().argmax(-1)
    log_probs = rows_after(lattice, index).log_softmax(-1)
    own = log_probs.gather(-1, index[..., None])[..., 0]
    losses = -CE_WEIGHT * own
    if target_logits is not None:
        worse = (target_logits.gather(-1, index[..., None]) - target_logits).clamp_min(0)
        losses = losses + penalty * (log_probs.exp() * worse).sum(-1)
    can_take = is_candidate & nn.functional.pad(is_candidate[:, :-1], (1, 0), value=True)
    return WalkLosses(losses * can_take, own.detach().exp() * can_take, is_candidate)
