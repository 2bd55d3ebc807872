"""DFlash2's candidate selector: how well a candidate follows the token before is added to its logit.

Here are its sizes and config keys, its scores and its loss. Its network is `CandidateSelectorNetwork` of
`dpace.modeling_dflash`.

Source: DFlash2, z-lab/dflash; the loss is ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpace.config import DrafterConfig
from dpace.drafter.selector import BlockCandidates, LatticeSelector, SelectorSizes
from dpace.drafter.values import StrictCount
from dpace.drafter.views import BlocksHidden
from dpace.loss import SlotScores, candidate_logits
from dpace.loss.scorer import Scorer
from dpace.system.ledger import JsonObject


class CandidateSelector(LatticeSelector):
    """Adds the network's numbers to the logits of candidates."""

    name = "candidate_selector"

    def score(self, candidates: BlockCandidates) -> Float[Tensor, "block draft choice choice"]:
        """Add what the network says of each pair of tokens to the log-probability of the second."""
        tokens = candidates.tokens
        # Before the first slot stands the anchor's token only; it takes the place of all candidates.
        anchor_tokens = candidates.last_ids[:, None, None].expand(-1, 1, self.num_candidates)
        tokens_before = torch.cat([anchor_tokens, tokens[:, :-1]], dim=1)
        queries = self.network.queries(tokens_before, candidates.hidden)
        return self.network(queries, tokens) + candidates.log_probs[..., None, :]

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
            queries = self.network.queries(labels[..., :-1, None], hidden)
            added = self.network(queries, rows.tokens(index))[..., 0, :]
        label_places = (index == label_rows).int().argmax(-1)
        # Classes are dimension 1 of `cross_entropy`.
        losses = nn.functional.cross_entropy((logits + added).movedim(-1, 1), label_places, reduction="none")
        return scores._replace(losses=scores.losses + (scores.weights[..., 1:] * losses).sum(-1))


@dataclass(frozen=True)
class CandidateSelectorSizes(SelectorSizes):
    """Sizes of DFlash2's selector."""

    name = "candidate_selector"
    prefix = "selector_"
    architecture = "DFlashSelectorDraftModel"
    with_convolutions = "DFlash2DraftModel"
    selector = CandidateSelector
    reads = ("selector_candidates", "selector_width")

    top_k: StrictCount
    """Best tokens of each slot that it chooses from."""
    rank: StrictCount
    """Numbers of a token in each of its two tables."""

    @classmethod
    def chosen(cls, config: DrafterConfig, hidden_size: int) -> "CandidateSelectorSizes":
        """Choose the sizes of a selector: the published ones, and smaller ones next to a small target.

        Its tables have a row for each token. At 576 and a rank of 64 they have as many numbers as the drafter.
        """
        top_k, rank = (8, 64) if hidden_size < 1024 else (16, 256)
        return cls(top_k=config.selector_candidates or top_k, rank=config.selector_width or rank)

    def options(self, hidden_size: int) -> JsonObject:
        """Return the options that ask for these sizes; the target's width plays no part."""
        return {"selector_candidates": self.top_k, "selector_width": self.rank}


SIZES = CandidateSelectorSizes
