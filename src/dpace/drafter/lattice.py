"""Drafts that are walks through scores of each candidate of a slot after each one of the slot before.

What comes in are the drafter's hidden states; what goes out are drafts, and the loss of a selector whose network says
how well a token follows another one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpace.drafter.selector import SCORED_ROWS, Draft, DraftSampler, Drawn, Selector
from dpace.drafter.views import BlocksHidden
from dpace.fast.top import topk
from dpace.loss import SlotScores, candidate_logits
from dpace.loss.scorer import Scorer
from dpace.target.draft_rows import DraftRows


class BlockCandidates(NamedTuple):
    """The candidates of blocks, and what a selector scores them by."""

    rows: DraftRows
    """The LM head's rows of the tokens that may be drafted."""
    tokens: Int[Tensor, "block draft choice"]
    """The best of these at each slot."""
    log_probs: Float[Tensor, "block draft choice"]
    """Log-probabilities of these tokens in the drafter's softmax, at temperature 1, in fp32."""
    hidden: Float[Tensor, "block draft hidden"]
    """Final hidden states of the slots."""
    last_ids: Int[Tensor, " block"]
    """The tokens at the anchors."""
    before: Float[Tensor, "block hidden"]
    """What the drafter's attention reads of the token before each anchor."""


class Lattice(NamedTuple):
    """A selector's scores of the candidates of each slot; a walk through it, from slot to slot, is a draft."""

    candidates: Int[Tensor, "batch draft choice"]
    """Tokens, the drafter's best first."""
    scores: Float[Tensor, "batch draft choice choice"]
    """Scores of a slot's candidates after each candidate of the slot before; in the first slot all are after the
    anchor."""
    log_odds: Float[Tensor, "batch draft"]
    """Logarithm of the odds that a slot's token is a candidate, in the drafter's softmax."""


@dataclass(frozen=True)
class LatticeDraft(Draft):
    """A walk through a lattice."""

    lattice: Lattice

    def draw(self, num_drawn: int, sampler: DraftSampler) -> Drawn:
        """Draw the tokens from the lattice, a slot after the other.

        A slot's token is a draw from the softmax of its scores after the token drawn before, over the temperature.
        Filters of the target do not matter: any distribution keeps the target's text, if it is the one
        drawn from.
        """
        index = 0  # in the first slot all rows are alike
        drawn = []
        slot_probs = []
        for scores in self.lattice.scores[0, :num_drawn]:
            probs = (scores[index] / sampler.temperature).softmax(-1)
            index = torch.multinomial(probs, 1, generator=sampler.generator)[0]
            drawn.append(index)
            slot_probs.append(probs)
        candidates = self.lattice.candidates[0, :num_drawn]  # (draft, choice)
        tokens = candidates.gather(1, torch.stack(drawn)[:, None])[:, 0]
        probs = torch.stack(slot_probs)
        # Tokens that are no candidates are never drawn.
        return tokens, probs.new_zeros(len(tokens), len(self.rows.target.head.weight)).scatter_(1, candidates, probs)


class LatticeSelector(Selector):
    """Walks through the lattice of a block's candidates; shapes and arguments are as in `Selector`."""

    def __init__(self, network: Any):
        super().__init__(network)
        self.num_candidates = network.num_candidates

    def score(self, candidates: BlockCandidates) -> Float[Tensor, "block draft choice choice"]:
        """Compute `Lattice.scores`."""
        raise NotImplementedError

    def make_lattice(self, candidates: BlockCandidates) -> Lattice:
        """Score the candidates of blocks."""
        # Without `eps` the odds would be infinite where rounding gives all probability to the candidates.
        log_odds = candidates.log_probs.detach().exp().sum(-1).logit(eps=1e-6)
        return Lattice(candidates.tokens, self.score(candidates), log_odds)

    def propose(
        self,
        rows: DraftRows,
        hidden: Float[Tensor, "batch slot hidden"],
        last_ids: Int[Tensor, " batch"],
        before: Float[Tensor, "batch hidden"],
        width: int,
    ) -> LatticeDraft:
        """Walk through the lattice of all slots, as in training, and propose the first tokens."""
        states = hidden[:, 1:]
        logits = rows.logits(states.flatten(0, 1)).float()  # (batch * draft, choice)
        top, index = topk(logits, self.num_candidates)
        log_probs = (top - logits.logsumexp(-1, keepdim=True)).unflatten(0, states.shape[:2])
        candidates = rows.tokens(index.view(log_probs.shape))
        lattice = self.make_lattice(BlockCandidates(rows, candidates, log_probs, states, last_ids, before))
        tokens, scores = take_walk(lattice)
        # Later slots are cut off only now: their candidates count in the scores of the earlier ones.
        return LatticeDraft(rows, tokens[:, : width - 1], scores[:, : width - 1], lattice)

    def match(self, drafted: BlocksHidden, rows: DraftRows) -> tuple[Tensor, Bool[Tensor, "way block slot"]]:
        """Find the accepted slots of the walk, of each slot's own best token, and of candidates that are the label."""
        # The batch is one text, whose blocks are the rows of all that follows.
        blocks = drafted.blocks
        labels = blocks.labels[0, :, 1:]
        num_drafts = labels.shape[1]
        num_blocks = max(1, SCORED_ROWS // num_drafts)
        drafts = []
        inputs = drafted.hidden[0], blocks.labels[0, :, 0], drafted.before[0]
        for hidden, last_ids, before in zip(*[values.split(num_blocks) for values in inputs], strict=True):
            drafts.append(self.propose(rows, hidden, last_ids, before, num_drafts + 1))
        tokens = torch.cat([draft.tokens for draft in drafts])
        is_true = torch.cat([draft.lattice.candidates for draft in drafts]) == labels[..., None]
        is_right = torch.stack([tokens == labels, is_true[..., 0], is_true.any(-1)])
        is_accepted = (is_right & blocks.is_scored[..., 1:]).int().cumprod(-1).bool()
        scores = torch.cat([draft.scores for draft in drafts])
        # Nothing for the anchor, which is no draft.
        return nn.functional.pad(scores, (0, 0, 1, 0))[None], nn.functional.pad(is_accepted, (1, 0))

    def scores(self, states: Float[Tensor, "slot state"], rows: DraftRows) -> Float[Tensor, "slot choice"]:
        """Return the states, which are scores."""
        return states


class PairSelector(LatticeSelector):
    """Adds to a candidate's logit how well it follows the token before, as its network says.

    The network computes what is added, in fp32, "... slot before candidate", from the tokens that may stand before each
    slot, "... slot before", the slot's hidden state, "... slot hidden", and the tokens for it, "... slot candidate".
    """

    def score(self, candidates: BlockCandidates) -> Float[Tensor, "block draft choice choice"]:
        """Add what the network says of each pair of tokens to the log-probability of the second."""
        tokens = candidates.tokens
        # Before the first slot stands the anchor's token only; it takes the place of all candidates.
        anchor_tokens = candidates.last_ids[:, None, None].expand(-1, 1, self.num_candidates)
        tokens_before = torch.cat([anchor_tokens, tokens[:, :-1]], dim=1)
        return self.network(tokens_before, candidates.hidden, tokens) + candidates.log_probs[..., None, :]

    def add_loss(self, scores: SlotScores, drafted: BlocksHidden, scorer: Scorer) -> SlotScores:
        """Add the cross-entropy of the target's token among the candidates, after its own token before.

        A token that is no candidate takes the last one's place. Slots count as the objective says. The rest of the
        drafter gets no gradient from it; only the norm for clipping is the norm of both.

        Memory: the LM head's rows of all candidates, in fp32.
        """
        rows = scorer.rows
        labels = drafted.blocks.labels
        # From here on without slot 0, which drafts nothing; "batch block draft candidate", as rows of the head.
        label_rows = rows.index(labels)[..., 1:, None]
        index = scores.candidates[..., 1:, :].clamp_min(0)  # -1 where nothing is scored
        is_missing = (index != label_rows).all(-1, keepdim=True)
        last = torch.where(is_missing, label_rows, index[..., -1:])
        index = torch.cat([index[..., :-1], last], dim=-1)
        hidden = drafted.hidden[..., 1:, :].detach()
        logits = candidate_logits(hidden, rows.head, index)
        with scorer.autocast():
            # One token stands before each slot: the target's own.
            added = self.network(labels[..., :-1, None], hidden, rows.tokens(index))[..., 0, :]
        label_places = (index == label_rows).int().argmax(-1)
        # Classes are dimension 1 of `cross_entropy`.
        losses = nn.functional.cross_entropy((logits + added).movedim(-1, 1), label_places, reduction="none")
        return scores._replace(losses=scores.losses + (scores.weights[..., 1:] * losses).sum(-1))


def take_walk(lattice: Lattice) -> tuple[Int[Tensor, "batch draft"], Float[Tensor, "batch draft choice_or_rest"]]:
    """Take the best candidate of each slot after the candidate taken before; on ties the drafter's better one.

    Returns:
        The tokens; and the scores that each was the best of, with a last one for all tokens that are no candidates: in
        the softmax it has the share that the drafter gives them.
    """
    # The best candidate after each one before: (batch, draft, choice). Following it takes one gather a slot.
    best = lattice.scores.argmax(-1)
    taken = [best[:, 0, :1]]
    for best_of_slot in best[:, 1:].unbind(1):
        taken.append(best_of_slot.gather(1, taken[-1]))
    index = torch.cat(taken, dim=1)
    scores = rows_after(lattice.scores, index)
    # A score `rest` with sum(exp(scores)) / exp(rest) = odds, the odds that the token is a candidate.
    rest = scores.logsumexp(-1) - lattice.log_odds
    tokens = lattice.candidates.gather(-1, index[..., None])[..., 0]
    return tokens, torch.cat([scores, rest[..., None]], dim=-1)


def rows_after(
    scores: Float[Tensor, "batch slot choice choice"], index: Int[Tensor, "batch draft"]
) -> Float[Tensor, "batch draft choice"]:
    """Return the scores of the first slots' candidates, each after the candidate `index` of the slot before.

    Args:
        scores: as `Lattice.scores`.
        index: of the candidate that is taken in each of the first slots.
    """
    # Each slot takes the choice of the slot before; the first one any, here 0, since its rows are alike.
    before = nn.functional.pad(index[:, :-1], (1, 0))[..., None, None]
    return scores[:, : index.shape[1]].gather(2, before.expand(-1, -1, 1, scores.shape[-1]))[:, :, 0]
