"""How the tokens of a draft are chosen from what the network computes for each slot.

Here is each slot's own best token; `dpace.drafter.lattice` walks through candidates. A selector with a network of its
own is a file with a subclass of `SelectorSizes`, which names a subclass of `Selector`. Training, measuring and decoding
call the methods of the second; files and options call the methods of the first.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpace.config import DrafterConfig
from dpace.drafter.views import BlocksHidden
from dpace.fast.top import argmax
from dpace.loss import SlotScores
from dpace.loss.scorer import Scorer
from dpace.system.ledger import JsonObject
from dpace.target.draft_rows import DraftRows
from dpace.target.head import LmHead

SCORED_ROWS = 128
"""Number of slots whose logits exist at once where known responses are measured."""
Drawn = tuple[Int[Tensor, " draft"], Float[Tensor, "draft vocab"]]
"""The tokens that were drawn, and the distribution that each was drawn from."""


@runtime_checkable
class DraftSampler(Protocol):
    """What drafts are drawn with: the target's sampler, `dpace.decode.sampling.Sampler`."""

    temperature: float
    generator: torch.Generator | None

    def scores(self, logits: Float[Tensor, "slot vocab"]) -> Float[Tensor, "slot vocab"]:
        """Apply all filters."""
        ...

    def probs(self, scores: Float[Tensor, "slot vocab"]) -> Float[Tensor, "slot vocab"]:
        """Compute the distribution of each row."""
        ...


@runtime_checkable
class Conversations(Protocol):
    """What is trained on: `dpace.batches.dataset.ResponseDataset`."""

    def __len__(self) -> int:
        """Count the conversations."""
        ...

    def token_ids(self, index: int) -> Int[Tensor, " seq"]:
        """Return the tokens of a conversation."""
        ...

    def is_response(self, index: int) -> Bool[Tensor, " seq"]:
        """Return which of these the target wrote."""
        ...


@dataclass(frozen=True)
class Draft:
    """What a drafter proposes after each text.

    A selector that draws in another way has a subclass, with fields for what it draws from.
    """

    rows: DraftRows
    """Rows of the tokens that may be drafted."""
    tokens: Int[Tensor, "batch draft"]
    """The best token of each slot."""
    scores: Float[Tensor, "batch draft choice"]
    """Logits of each slot's choices; of a selector that chooses from candidates, a last one for all other tokens."""

    def draw(self, num_drawn: int, sampler: DraftSampler) -> Drawn:
        """Draw a draft of one text for speculative sampling.

        Args:
            num_drawn: number of slots that will be verified.
            sampler: the target's.
        """
        return draw_draft(self.rows.spread(self.scores[0, :num_drawn]), sampler)


class Selector:
    """Takes each slot's own best token.

    Args:
        network: its own network in the drafter, if it has one.
    """

    num_candidates = 1
    """Number of best tokens of each slot that it chooses from; 1 where it has no choice."""

    def __init__(self, network: Any = None):
        self.network = network

    def begin(self, conversations: Conversations) -> None:
        """Set first weights of the network from what will be trained on; by default they stay as they were drawn."""

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
        before: Float[Tensor, "batch hidden"],
        width: int,
    ) -> Draft:
        """Propose the best tokens.

        Args:
            rows: of the tokens that may be drafted.
            hidden: of whole blocks.
            last_ids: the tokens at the anchors.
            before: what the drafter's attention reads of the token before each anchor.
            width: number of slots that may be verified, the anchor included.
        """
        # (batch * draft, choice), since `argmax` is fast on rows; slot 0 drafts nothing.
        logits = rows.logits(hidden[:, 1:width].flatten(0, 1))
        tokens = rows.tokens(argmax(logits.float())).unflatten(0, (len(hidden), -1))
        return Draft(rows, tokens, logits.unflatten(0, tokens.shape))

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


def draw_draft(logits: Float[Tensor, "draft vocab"], sampler: DraftSampler) -> Drawn:
    """Draw each slot's token from its logits, all at once, since filters look at each slot alone; see `Draft.draw`."""
    probs = sampler.probs(sampler.scores(logits))
    return torch.multinomial(probs, 1, generator=sampler.generator)[:, 0], probs


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
    reads: ClassVar[dict[str, str]] = {}
    """Options that it reads of those whose names begin with `selector_`, and the field that each chooses, if there is
    one; other options are refused with it."""
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
        """Return the options `selector_NAME` of `DrafterConfig` that ask for these sizes; the inverse of `chosen`.

        A width of 0 is the drafter's, `hidden_size`.
        """
        return {option: getattr(self, size) or hidden_size for option, size in self.reads.items() if size}

    def check(self, hidden_size: int) -> None:
        """Refuse sizes that no network of a drafter of this width has.

        Raises:
            ValueError: names the value.
        """

    def config_keys(self) -> JsonObject:
        """Return what it adds to `dflash_config`."""
        return {f"{self.prefix}{key}": value for key, value in vars(self).items()}
