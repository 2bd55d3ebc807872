"""Selectors that score each candidate of a slot after each candidate of the slot before.

A subclass gives the scores and the loss that it is trained with. Here are the walk through them, its draws and its
accepted slots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpace.drafter.selector import SCORED_ROWS, Draft, Selector
from dpace.drafter.vocabulary import DraftRows


class Lattice(NamedTuple):
    """A head's scores of the candidates of each slot; a walk through it, from slot to slot, is a draft."""

    candidates: Int[Tensor, "batch draft choice"]
    """Tokens, the drafter's best first."""
    scores: Float[Tensor, "batch draft choice choice"]
    """Scores of a slot's candidates after each candidate of the slot before; in the first slot all are after the
    anchor."""
    log_odds: Float[Tensor, "batch draft"]
    """Logarithm of the odds that a slot's token is a candidate, in the drafter's softmax."""


class LatticeSelector(Selector):
    """Walks through the lattice of a block's candidates; shapes and arguments are those of `Selector`."""

    def __init__(self, drafter: Any):
        super().__init__(drafter)
        self.num_candidates = self.network.num_candidates

    @property
    def network(self) -> Any:
        """Its network in the drafter."""
        return getattr(self.drafter, self.name)

    def score(
        self, rows, candidates, log_probs, hidden, last_ids, before
    ) -> Float[Tensor, "block draft choice choice"]:
        """Compute `Lattice.scores` from its candidates and the other arguments of `make_lattice`."""
        raise NotImplementedError

    def make_lattice(
        self,
        rows: DraftRows,
        index: Int[Tensor, "block draft choice"],
        log_probs: Float[Tensor, "block draft choice"],
        hidden: Float[Tensor, "block draft hidden"],
        last_ids: Int[Tensor, " block"],
        before: Callable[[], Float[Tensor, "block hidden"]],
    ) -> Lattice:
        """Score the candidates of blocks.

        Args:
            rows: of the tokens that may be drafted.
            index: the best of these rows at each slot.
            log_probs: theirs in the drafter's softmax, at temperature 1, in fp32.
            hidden: final hidden states of the slots.
            last_ids: see `Selector.propose`, as the next one.
            before: returns what the drafter's attention reads of the token before each anchor.
        """
        candidates = rows.tokens(index)
        scores = self.score(rows, candidates, log_probs, hidden, last_ids, before)
        return Lattice(candidates, scores, log_odds_of(log_probs.detach()))

    def propose(self, rows, hidden, last_ids, before, width):
        """Walk through the lattice of all slots, as in training, and propose the first tokens."""
        states = hidden[:, 1:]
        logits = rows.logits(states.flatten(0, 1))
        log_probs, index = (x.unflatten(0, states.shape[:2]) for x in candidates_of(logits, self.num_candidates))
        lattice = self.make_lattice(rows, index, log_probs, states, last_ids, before)
        tokens, scores = take_walk(lattice)
        return Draft(tokens[:, : width - 1], scores[:, : width - 1], lattice)

    def draw(self, draft, num_drawn, rows, text, sampler):
        """Draw the tokens from the lattice, a slot after the other.

        A slot's token is a draw from the softmax of its scores after the token drawn before, over the temperature.
        Filters and processors of the target do not matter: any distribution keeps the target's text, if it is the one
        drawn from.
        """
        lattice = draft.lattice
        index = 0
        chosen = []
        for scores in lattice.scores[0, :num_drawn]:
            probs = (scores[index] / sampler.temperature).softmax(-1)
            index = torch.multinomial(probs, 1, generator=sampler.generator)[0]
            chosen.append(index)
        tokens = lattice.candidates[0, :num_drawn].gather(1, torch.stack(chosen)[:, None])[:, 0]
        return tokens, self.chances(draft, tokens[None], rows, sampler)[0]

    def chances(self, draft, tokens, rows, sampler):
        """Score the candidates after each token before; after one that is no candidate, as after the first."""
        lattice = Lattice(*(values.expand(len(tokens), *values.shape[1:]) for values in draft.lattice))
        candidates = lattice.candidates[:, : tokens.shape[1]]
        index = (candidates == tokens[..., None]).int().argmax(-1)
        probs = (rows_after(lattice, index) / sampler.temperature).softmax(-1)
        return probs.new_zeros(*tokens.shape, len(rows.target.head.weight)).scatter_(2, candidates, probs)

    def match(self, found, rows):
        """Find the accepted slots of the walk, of each slot's own best token, and of candidates that are the label."""
        labels = found.blocks.labels[0, :, 1:]
        num_slots = labels.shape[1]
        inputs = found.hidden[0], found.blocks.labels[0, :, 0], found.before[0]
        parts = [states.split(max(1, SCORED_ROWS // num_slots)) for states in inputs]
        drafts = [
            self.propose(rows, hidden, last_ids, lambda before=before: before, num_slots + 1)
            for hidden, last_ids, before in zip(*parts, strict=True)
        ]
        tokens, scores, lattices = zip(*drafts, strict=True)
        is_true = torch.cat([lattice.candidates for lattice in lattices]) == labels[..., None]
        is_right = torch.stack([torch.cat(tokens) == labels, is_true[..., 0], is_true.any(-1)])
        is_accepted = (is_right & found.blocks.is_scored[..., 1:]).int().cumprod(-1).bool()
        return nn.functional.pad(torch.cat(scores), (0, 0, 1, 0))[None], nn.functional.pad(is_accepted, (1, 0))

    def scores(self, states, rows):
        """Return the states, which are scores."""
        return states


def take_walk(lattice: Lattice) -> tuple[Int[Tensor, "batch draft"], Float[Tensor, "batch draft choice_or_rest"]]:
    """Take the best candidate of each slot after that of the slot before; on ties the drafter's better one.

    Returns:
        The tokens; and the scores that each was the best of, with a last one for all tokens that are no candidates: in
        the softmax it has the share that the drafter gives them.
    """
    best = lattice.scores.argmax(-1)
    taken = [best[:, 0, :1]]
    for of_slot in best[:, 1:].unbind(1):
        taken.append(of_slot.gather(1, taken[-1]))
    index = torch.cat(taken, dim=1)
    scores = with_rest(rows_after(lattice, index), lattice.log_odds)
    return lattice.candidates.gather(-1, index[..., None])[..., 0], scores


def candidates_of(
    logits: Float[Tensor, "slot row"], num_candidates: int
) -> tuple[Float[Tensor, "slot choice"], Int[Tensor, "slot choice"]]:
    """Return the best rows of slots, best first: their log-probabilities in fp32, and which they are."""
    logits = logits.float()
    top, index = logits.topk(num_candidates)
    return top - logits.logsumexp(-1, keepdim=True), index


def log_odds_of(log_probs: Float[Tensor, "*slots choice"]) -> Float[Tensor, "*slots"]:
    """Return the logarithm of the odds that a slot's token is a candidate."""
    return log_probs.exp().sum(-1).logit(eps=1e-6)


def with_rest(scores: Float[Tensor, "*slots choice"], log_odds: Float[Tensor, "*slots"]) -> Tensor:
    """Append a score for all tokens that are no candidates: in the softmax it has the share that the drafter gives."""
    rest = scores.logsumexp(-1) - log_odds
    return torch.cat([scores, rest[..., None]], dim=-1)


def rows_after(lattice: Lattice, index: Int[Tensor, "batch draft"]) -> Float[Tensor, "batch draft choice"]:
    """Return the scores of the first slots' candidates, each after the candidate `index` of the slot before."""
    scores = lattice.scores[:, : index.shape[1]]
    before = nn.functional.pad(index[:, :-1], (1, 0))[..., None, None]
    return scores.gather(2, before.expand(-1, -1, 1, scores.shape[-1]))[:, :, 0]
