"""How the tokens of a draft are chosen from what the network computes for each slot.

Here are each slot's own best token, and a walk through scores of each candidate after each one of the slot before. A
selector with a network of its own is a file with a subclass of `LatticeSelector` and one of `SelectorSizes`. Training,
measuring and decoding call the methods of the first; files and options call the methods of the second.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpace.config import DrafterConfig
from dpace.drafter.views import BlocksHidden
from dpace.fast.top import argmax, topk
from dpace.loss import SlotScores
from dpace.loss.scorer import Scorer
from dpace.modeling_dflash import DFlashDraftModel
from dpace.system.ledger import JsonObject
from dpace.target.draft_rows import DraftRows
from dpace.target.head import LmHead

SCORED_ROWS = 128
"""Number of slots whose logits exist at once where known responses are measured."""


class Draft(NamedTuple):
    """What a drafter proposes after each text."""

    tokens: Int[Tensor, "batch draft"]
    """The best token of each slot."""
    scores: Float[Tensor, "batch draft choice"]
    """Logits of each slot's choices; of a selector that chooses from candidates, a last one for all other tokens."""
    lattice: Any = None
    """What a selector of the drafter's own keeps of it."""


@runtime_checkable
class DraftSampler(Protocol):
    """What drafts are drawn with: the target's sampler, `dpace.decode.sampling.Sampler`."""

    temperature: float
    processors: object
    generator: torch.Generator | None

    def scores(self, logits: Float[Tensor, "slot vocab"], prefix: Sequence[int]) -> Float[Tensor, "slot vocab"]:
        """Apply all processors and filters."""
        ...

    def probs(self, scores: Float[Tensor, "slot vocab"]) -> Float[Tensor, "slot vocab"]:
        """Compute the distribution of each row."""
        ...


class Selector:
    """Takes each slot's own best token.

    Args:
        drafter: whose network computes the hidden states.
    """

    name = ""
    """Name of its network in the drafter, with which the names of its tensors begin."""
    num_candidates = 1
    """Number of best tokens of each slot that it chooses from; 1 where it has no choice."""

    def __init__(self, drafter: DFlashDraftModel):
        self.drafter = drafter

    @property
    def network(self) -> Any:
        """Its network in the drafter."""
        return getattr(self.drafter, self.name)

    def add_loss(self, scores: SlotScores, drafted: BlocksHidden, scorer: Scorer) -> SlotScores:
        """Add the loss that the selector itself is trained with; this one has nothing to train.

        Args:
            scores: of the blocks, without it.
            drafted: what the forward pass gave.
            scorer: of the training.
        """
        return scores

    def states(self, drafted: BlocksHidden) -> Float[Tensor, "batch block slot state"]:
        """Return what `head` and `scores` read of each slot."""
        return drafted.hidden

    def head(self, rows: DraftRows) -> LmHead:
        """Return the head that states are trained with."""
        return rows.head

    def propose(
        self,
        rows: DraftRows,
        hidden: Float[Tensor, "batch slot hidden"],
        last_ids: Int[Tensor, " batch"],
        before: Callable[[], Float[Tensor, "batch hidden"]],
        width: int,
    ) -> Draft:
        """Propose the best tokens.

        Args:
            rows: of the tokens that may be drafted.
            hidden: of whole blocks.
            last_ids: the tokens at the anchors.
            before: returns what the drafter's attention reads of the token before each anchor.
            width: number of slots that may be verified, the anchor included.
        """
        # (batch * draft, choice), since `argmax` is fast on rows; slot 0 drafts nothing.
        logits = rows.logits(hidden[:, 1:width].flatten(0, 1))
        tokens = rows.tokens(argmax(logits.float())).unflatten(0, (len(hidden), -1))
        return Draft(tokens, logits.unflatten(0, tokens.shape))

    def draw(
        self, draft: Draft, num_drawn: int, rows: DraftRows, text: Sequence[int], sampler: DraftSampler
    ) -> tuple[Int[Tensor, " draft"], Float[Tensor, "draft vocab"]]:
        """Draw a draft of one text for speculative sampling.

        Args:
            draft: what was proposed.
            num_drawn: number of slots that will be verified.
            rows: of the tokens that may be drafted.
            text: the tokens before the draft.
            sampler: the target's.

        Returns:
            The tokens, and the distribution that each was drawn from.
        """
        return draw_draft(rows.spread(draft.scores[0, :num_drawn]), text, sampler)

    def match(self, drafted: BlocksHidden, rows: DraftRows) -> tuple[Tensor, Bool[Tensor, "way block slot"]]:
        """Find the slots of a text's blocks that greedy verification accepts: those before its first wrong draft.

        Blocks that are right so far go on with twice as many slots, so little more than tau rows of a block are read.

        Returns:
            States of the slots, "1 block slot state", which `scores` turns into scores of a draft; and the accepted
            slots, first as they are drafted, then in the other ways of `Acceptance.bounds`.
        """
        all_states = self.states(drafted)
        labels = drafted.blocks.labels
        is_scored = drafted.blocks.is_scored
        is_match = torch.zeros_like(is_scored)
        is_right = torch.ones_like(is_scored[..., 0])  # blocks without a wrong draft so far
        start = 1
        while start < drafted.blocks.block_size and is_right.any():
            tried = slice(start, 2 * start)
            is_tried = is_right[..., None] & is_scored[..., tried]
            tokens = []
            for states in all_states[..., tried, :][is_tried].split(SCORED_ROWS):
                tokens.append(rows.tokens(argmax(self.scores(states, rows).float())))
            is_match[..., tried][is_tried] = torch.cat(tokens) == labels[..., tried][is_tried]
            is_right = is_match[..., tried].all(-1)
            start *= 2
        is_accepted = is_match[..., 1:].int().cumprod(-1).bool()
        # The anchor is no draft.
        return all_states, nn.functional.pad(is_accepted, (1, 0))

    def scores(self, states: Float[Tensor, "slot state"], rows: DraftRows) -> Float[Tensor, "slot choice"]:
        """Turn states of `match` into scores of a `Draft`."""
        return rows.logits(states)


def draw_draft(
    logits: Float[Tensor, "draft vocab"], text: Sequence[int], sampler: DraftSampler
) -> tuple[Int[Tensor, " draft"], Float[Tensor, "draft vocab"]]:
    """Draw each slot's token from its logits; see `Selector.draw`.

    Processors see the text and the draft tokens that were drawn before a slot, as they do when the target verifies it.
    """
    # Filters look at each slot alone, so all slots are drawn at once.
    if not sampler.processors:
        probs = sampler.probs(sampler.scores(logits, text))
        return torch.multinomial(probs, 1, generator=sampler.generator)[:, 0], probs
    drawn = []
    slot_probs = []
    for slot_logits in logits:
        probs = sampler.probs(sampler.scores(slot_logits[None], [*text, *drawn]))
        drawn.append(int(torch.multinomial(probs, 1, generator=sampler.generator)))
        slot_probs.append(probs)
    return torch.tensor(drawn, device=logits.device), torch.cat(slot_probs)


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
    before: Callable[[], Float[Tensor, "block hidden"]]
    """Returns what the drafter's attention reads of the token before each anchor."""


class Lattice(NamedTuple):
    """A selector's scores of the candidates of each slot; a walk through it, from slot to slot, is a draft."""

    candidates: Int[Tensor, "batch draft choice"]
    """Tokens, the drafter's best first."""
    scores: Float[Tensor, "batch draft choice choice"]
    """Scores of a slot's candidates after each candidate of the slot before; in the first slot all are after the
    anchor."""
    log_odds: Float[Tensor, "batch draft"]
    """Logarithm of the odds that a slot's token is a candidate, in the drafter's softmax."""


class LatticeSelector(Selector):
    """Walks through the lattice of a block's candidates; shapes and arguments are as in `Selector`."""

    def __init__(self, drafter: DFlashDraftModel):
        super().__init__(drafter)
        self.num_candidates = self.network.num_candidates

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
        before: Callable[[], Float[Tensor, "batch hidden"]],
        width: int,
    ) -> Draft:
        """Walk through the lattice of all slots, as in training, and propose the first tokens."""
        states = hidden[:, 1:]
        logits = rows.logits(states.flatten(0, 1)).float()  # (batch * draft, choice)
        top, index = topk(logits, self.num_candidates)
        log_probs = (top - logits.logsumexp(-1, keepdim=True)).unflatten(0, states.shape[:2])
        candidates = rows.tokens(index.view(log_probs.shape))
        lattice = self.make_lattice(BlockCandidates(rows, candidates, log_probs, states, last_ids, before))
        tokens, scores = take_walk(lattice)
        # Later slots are cut off only now: their candidates count in the scores of the earlier ones.
        return Draft(tokens[:, : width - 1], scores[:, : width - 1], lattice)

    def draw(
        self, draft: Draft, num_drawn: int, rows: DraftRows, text: Sequence[int], sampler: DraftSampler
    ) -> tuple[Int[Tensor, " draft"], Float[Tensor, "draft vocab"]]:
        """Draw the tokens from the lattice, a slot after the other.

        A slot's token is a draw from the softmax of its scores after the token drawn before, over the temperature.
        Filters and processors of the target do not matter: any distribution keeps the target's text, if it is the one
        drawn from.
        """
        lattice = draft.lattice
        index = 0  # in the first slot all rows are alike
        drawn = []
        slot_probs = []
        for scores in lattice.scores[0, :num_drawn]:
            probs = (scores[index] / sampler.temperature).softmax(-1)
            index = torch.multinomial(probs, 1, generator=sampler.generator)[0]
            drawn.append(index)
            slot_probs.append(probs)
        candidates = lattice.candidates[0, :num_drawn]  # (draft, choice)
        tokens = candidates.gather(1, torch.stack(drawn)[:, None])[:, 0]
        probs = torch.stack(slot_probs)
        # Tokens that are no candidates are never drawn.
        return tokens, probs.new_zeros(len(tokens), len(rows.target.head.weight)).scatter_(1, candidates, probs)

    def match(self, drafted: BlocksHidden, rows: DraftRows) -> tuple[Tensor, Bool[Tensor, "way block slot"]]:
        """Find the accepted slots of the walk, of each slot's own best token, and of candidates that are the label."""
        # The batch is one text, whose blocks are the rows of all that follows.
        blocks = drafted.blocks
        labels = blocks.labels[0, :, 1:]
        num_drafts = labels.shape[1]
        num_blocks = max(1, SCORED_ROWS // num_drafts)
        tokens = []
        scores = []
        candidates = []
        inputs = drafted.hidden[0], blocks.labels[0, :, 0], drafted.before[0]
        for hidden, last_ids, before in zip(*[values.split(num_blocks) for values in inputs], strict=True):
            draft = self.propose(rows, hidden, last_ids, lambda before=before: before, num_drafts + 1)
            tokens.append(draft.tokens)
            scores.append(draft.scores)
            candidates.append(draft.lattice.candidates)
        is_true = torch.cat(candidates) == labels[..., None]
        is_right = torch.stack([torch.cat(tokens) == labels, is_true[..., 0], is_true.any(-1)])
        is_accepted = (is_right & blocks.is_scored[..., 1:]).int().cumprod(-1).bool()
        # Nothing for the anchor, which is no draft.
        return nn.functional.pad(torch.cat(scores), (0, 0, 1, 0))[None], nn.functional.pad(is_accepted, (1, 0))

    def scores(self, states: Float[Tensor, "slot state"], rows: DraftRows) -> Float[Tensor, "slot choice"]:
        """Return the states, which are scores."""
        return states


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
    scores = rows_after(lattice, index)
    # A score `rest` with sum(exp(scores)) / exp(rest) = odds, the odds that the token is a candidate.
    rest = scores.logsumexp(-1) - lattice.log_odds
    tokens = lattice.candidates.gather(-1, index[..., None])[..., 0]
    return tokens, torch.cat([scores, rest[..., None]], dim=-1)


def rows_after(lattice: Lattice, index: Int[Tensor, "batch draft"]) -> Float[Tensor, "batch draft choice"]:
    """Return the scores of the first slots' candidates, each after the candidate `index` of the slot before."""
    scores = lattice.scores[:, : index.shape[1]]
    # Each slot takes the choice of the slot before; the first one any, here 0, since its rows are alike.
    before = nn.functional.pad(index[:, :-1], (1, 0))[..., None, None]
    return scores.gather(2, before.expand(-1, -1, 1, scores.shape[-1]))[:, :, 0]


@dataclass(frozen=True)
class SelectorSizes:
    """Sizes of a selector's network, as a config and the options of training have them.

    A subclass has a field for each; published config keys are their names after `prefix`.
    """

    name: ClassVar[str]
    """Its choice of `--drafter.selector`, and the name of its network in `dpace.modeling_dflash.SELECTOR_NETWORKS`."""
    prefix: ClassVar[str]
    """What its keys in `dflash_config` begin with."""
    architecture: ClassVar[str]
    """Name of its networks in published configs."""
    with_convolutions: ClassVar[str] = ""
    """The same where layers have convolutions; empty where it does not differ."""
    selector: ClassVar[type[Selector]]
    reads: ClassVar[tuple[str, ...]] = ()
    """Options that it reads of those whose names begin with `selector_`; others are refused with it."""
    refused: ClassVar[tuple[str, ...]] = ("sample_from_anchor", "draft_vocab_size")
    """Fields of a `DrafterSpec` that have their default beside it."""
    from_anchor: ClassVar[bool] = False
    """`DrafterSpec.sample_from_anchor` where a file does not say; True in DSpark's layout."""
    older_names: ClassVar[dict[str, str]] = {}
    """Names that parts of its network may have in files, and the names that are written."""

    @classmethod
    def chosen(cls, config: DrafterConfig, hidden_size: int) -> "SelectorSizes":
        """Return the sizes that options of training ask for; by default there are none to choose.

        Args:
            config: the options.
            hidden_size: of the target.
        """
        return cls()

    def options(self, hidden_size: int) -> JsonObject:
        """Return the options `selector_NAME` of `DrafterConfig` that ask for these sizes; the inverse of `chosen`."""
        return {}

    def check(self, hidden_size: int) -> None:
        """Refuse sizes that no network of a drafter of this width has.

        Raises:
            ValueError: names the value.
        """

    def config_keys(self) -> JsonObject:
        """Return what it adds to `dflash_config`."""
        return {f"{self.prefix}{key}": value for key, value in vars(self).items()}
