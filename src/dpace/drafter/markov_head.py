"""DSpark's Markov head: how well a token follows the token before is added to its logit, for all tokens.

Here are its sizes and config keys, its drafts, and what it is trained with. Its network is `MarkovHead` of
`dpace.modeling_dflash`.

Source: DSpark (arXiv 2607.05147), deepseek-ai/DeepSpec.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpace.config import DrafterConfig
from dpace.drafter.bigrams import begin_with_bigrams
from dpace.drafter.selector import (
    Conversations,
    Draft,
    DraftSampler,
    Drawn,
    Selector,
    SelectorSizes,
    draw_draft,
)
from dpace.drafter.values import StrictCount
from dpace.drafter.views import BlocksHidden
from dpace.fast.top import argmax
from dpace.target.draft_rows import DraftRows
from dpace.target.head import LmHead


class PairTables(NamedTuple):
    """The head's two tables, the second with the tokens that may be drafted."""

    first: nn.Embedding
    second: Float[Tensor, "choice rank"]

    def add_to(
        self, logits: Float[Tensor, "*slots choice"], before: Int[Tensor, "*slots"]
    ) -> Float[Tensor, "*slots choice"]:
        """Add to logits how well each token follows the token before its slot."""
        return logits + self.first(before) @ self.second.T


@dataclass(frozen=True)
class MarkovDraft(Draft):
    """Tokens of which each counts for the next one."""

    base: Float[Tensor, "batch draft choice"]
    """Logits of the slots without the head."""
    last_ids: Int[Tensor, " batch"]
    """The tokens at the anchors."""
    tables: PairTables

    def draw(self, num_drawn: int, sampler: DraftSampler) -> Drawn:
        """Draw each slot's token after the one drawn before."""
        tokens = [self.last_ids]
        probs = []
        for logits in self.base[0, :num_drawn]:
            scores = self.tables.add_to(logits[None], tokens[-1])
            drawn, slot_probs = draw_draft(self.rows.spread(scores), sampler)
            tokens.append(drawn)
            probs.append(slot_probs)
        return torch.cat(tokens[1:]), torch.cat(probs)


class MarkovSelector(Selector):
    """Adds the head's numbers to the logits of a slot, and takes the best token: one slot after the other.

    It has no candidates: all tokens that may be drafted get a number, as in DeepSpec and in engines. A state is a
    hidden state and the vector of the token before, one after the other. The LM head with the second table beside it
    turns states into scores in one product.

    The loss is the objective's, of these scores, after the target's own tokens before; drafter and first table learn
    it together. With DSpark's weights that is the first of its three terms, as DeepSpec, SpecForge and speculators
    compute it. The others compare with the target's distribution, and train a head for confidences.

    Memory: in training a copy of the LM head's rows, `rank` numbers wider, in their precision. In decoding the fp32
    logits of a block twice, and the table's rows of the tokens that may be drafted.
    """

    def begin(self, conversations: Conversations) -> None:
        """Let the tables say how often tokens follow each other in the answers."""
        begin_with_bigrams(self.network, conversations)

    def tables(self, rows: DraftRows) -> PairTables:
        """Return the tables, the second with the tokens that may be drafted."""
        second = self.network.markov_w2.weight
        if rows.token_ids is not None:
            second = second[rows.token_ids]
        return PairTables(self.network.markov_w1, second)

    def states(self, drafted: BlocksHidden) -> Float[Tensor, "batch block slot state"]:
        """Add the vectors of the target's own tokens before: verification reaches no slot after another token."""
        # Before slot 0, which drafts nothing, any token.
        before = nn.functional.pad(drafted.blocks.labels[..., :-1], (1, 0))
        return torch.cat([drafted.hidden, self.network.markov_w1(before).to(drafted.hidden.dtype)], dim=-1)

    def head(self, rows: DraftRows) -> LmHead:
        """Put the second table beside the LM head, which has no factor and no cap (`MarkovSizes.refused`)."""
        weight = rows.head.weight
        return LmHead(torch.cat([weight, self.tables(rows).second.to(weight.dtype)], dim=1))

    def scores(self, states: Float[Tensor, "slot state"], rows: DraftRows) -> Float[Tensor, "slot choice"]:
        """Add the products of the vectors in the states to the logits of the hidden states."""
        table = self.tables(rows).second
        hidden, vectors = states.tensor_split([-table.shape[1]], dim=1)
        return rows.logits(hidden).float() + vectors @ table.T

    def propose(
        self,
        rows: DraftRows,
        hidden: Float[Tensor, "batch slot hidden"],
        last_ids: Int[Tensor, " batch"],
        before: Float[Tensor, "batch hidden"],
        width: int,
    ) -> MarkovDraft:
        """Propose the best token of each slot after the one before; the draft keeps the logits without the head."""
        base = rows.logits(hidden[:, 1:width].flatten(0, 1)).float().unflatten(0, (len(hidden), -1))
        tables = self.tables(rows)
        tokens = [last_ids]
        scores = []
        for logits in base.unbind(1):
            scores.append(tables.add_to(logits, tokens[-1]))
            tokens.append(rows.tokens(argmax(scores[-1])))
        return MarkovDraft(rows, torch.stack(tokens[1:], dim=1), torch.stack(scores, dim=1), base, last_ids, tables)


@dataclass(frozen=True)
class MarkovSizes(SelectorSizes):
    """Sizes of DSpark's head."""

    name = "markov_head"
    prefix = "markov_"
    architecture = "Qwen3DSparkModel"
    with_convolutions = "DSparkConvDraftModel"  # which no engine reads
    selector = MarkovSelector
    reads = {"selector_width": "rank"}
    refused = ("draft_vocab_size", "output_multiplier", "final_logit_softcapping")
    from_anchor = True

    rank: StrictCount
    """Numbers of a token in each of its two tables."""

    @classmethod
    def chosen(cls, config: DrafterConfig, hidden_size: int) -> "MarkovSizes":
        """Choose the published rank, and a smaller one next to a small target."""
        rank = 64 if hidden_size < 1024 else 256
        return cls(rank=config.selector_width or rank)


SIZES = MarkovSizes
