"""DSpark's Markov head: how well a token follows the token before is added to its logit, for all tokens.

Here are its sizes and config keys, its drafts, and what it is trained with. Its network is `MarkovHead` of
`dpace.modeling_dflash`.

Source: DSpark (arXiv 2607.05147), deepseek-ai/DeepSpec.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpace.config import DrafterConfig
from dpace.drafter.selector import Draft, DraftSampler, Selector, SelectorSizes, draw_draft
from dpace.drafter.values import StrictCount
from dpace.drafter.views import BlocksHidden
from dpace.fast.top import argmax
from dpace.system.ledger import JsonObject
from dpace.target.draft_rows import DraftRows
from dpace.target.head import LmHead


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

    name = "markov_head"

    def table(self, rows: DraftRows) -> Float[Tensor, "choice rank"]:
        """Return the second table's rows of the tokens that may be drafted."""
        table = self.network.markov_w2.weight
        return table if rows.token_ids is None else table[rows.token_ids]

    def states(self, drafted: BlocksHidden) -> Float[Tensor, "batch block slot state"]:
        """Add the vectors of the target's own tokens before: verification reaches no slot after another token."""
        # Before slot 0, which drafts nothing, any token.
        before = nn.functional.pad(drafted.blocks.labels[..., :-1], (1, 0))
        return torch.cat([drafted.hidden, self.network.markov_w1(before).to(drafted.hidden.dtype)], dim=-1)

    def head(self, rows: DraftRows) -> LmHead:
        """Put the table beside the LM head, which has no factor and no cap (`MarkovSizes.refused`)."""
        table = self.table(rows)
        weight = rows.head.weight
        return LmHead(torch.cat([weight, table.to(weight.dtype)], dim=1))

    def scores(self, states: Float[Tensor, "slot state"], rows: DraftRows) -> Float[Tensor, "slot choice"]:
        """Add the head's numbers to the logits of the hidden states."""
        table = self.table(rows)
        hidden, vectors = states.tensor_split([-table.shape[1]], dim=1)
        return rows.logits(hidden).float() + vectors @ table.T

    def propose(
        self,
        rows: DraftRows,
        hidden: Float[Tensor, "batch slot hidden"],
        last_ids: Int[Tensor, " batch"],
        before: Callable[[], Float[Tensor, "batch hidden"]],
        width: int,
    ) -> Draft:
        """Propose the best token of each slot after the one before; the draft keeps the logits without the head."""
        base = rows.logits(hidden[:, 1:width].flatten(0, 1)).float().unflatten(0, (len(hidden), -1))
        table = self.table(rows)
        tokens = [last_ids]
        scores = []
        for logits in base.unbind(1):
            scores.append(logits + self.network.markov_w1(tokens[-1]) @ table.T)
            tokens.append(rows.tokens(argmax(scores[-1])))
        return Draft(torch.stack(tokens[1:], dim=1), torch.stack(scores, dim=1), (base, last_ids))

    def draw(
        self, draft: Draft, num_drawn: int, rows: DraftRows, text: Sequence[int], sampler: DraftSampler
    ) -> tuple[Int[Tensor, " draft"], Float[Tensor, "draft vocab"]]:
        """Draw each slot's token after the one drawn before; processors see the text before the draft alone."""
        base, before = draft.lattice
        table = self.table(rows)
        drawn = []
        for logits in base[0, :num_drawn]:
            scores = rows.spread(logits + self.network.markov_w1(before) @ table.T)
            before, probs = draw_draft(scores, text, sampler)
            drawn.append((before, probs))
        tokens, slot_probs = map(torch.cat, zip(*drawn, strict=True))
        return tokens, slot_probs


@dataclass(frozen=True)
class MarkovSizes(SelectorSizes):
    """Sizes of DSpark's head."""

    name = "markov_head"
    prefix = "markov_"
    architecture = "Qwen3DSparkModel"
    with_convolutions = "DSparkConvDraftModel"  # which no engine reads
    selector = MarkovSelector
    reads = ("selector_width",)
    refused = ("draft_vocab_size", "output_multiplier", "final_logit_softcapping")
    from_anchor = True

    rank: StrictCount
    """Numbers of a token in each of its two tables."""

    @classmethod
    def chosen(cls, config: DrafterConfig, hidden_size: int) -> "MarkovSizes":
        """Choose the published rank, and a smaller one next to a small target."""
        rank = 64 if hidden_size < 1024 else 256
        return cls(rank=config.selector_width or rank)

    def options(self, hidden_size: int) -> JsonObject:
        """Return the option that asks for this rank; the target's width plays no part."""
        return {"selector_width": self.rank}


SIZES = MarkovSizes
