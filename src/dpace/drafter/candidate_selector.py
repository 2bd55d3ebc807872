"""DFlash2's candidate selector: how well a candidate follows the token before is added to its logit.

Here are its sizes and config keys, its scores and its loss. Its network is `CandidateSelectorNetwork` of
`dpace.modeling_dflash`.

Source: DFlash2, z-lab/dflash; the loss is ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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
        """See `LatticeSelector`."""
        tokens = candidates.tokens
        first = candidates.last_ids[:, None, None].expand(-1, 1, self.num_candidates)
        queries = self.network.queries(torch.cat([first, tokens[:, :-1]], dim=1), candidates.hidden)
        return self.network(queries, tokens) + candidates.log_probs[..., None, :]

    def add_loss(
        self, scores: SlotScores, found: BlocksHidden, scorer: Scorer, whole_blocks: Int[Tensor, " whole"] | None
    ) -> SlotScores:
        """Add the cross-entropy of the target's token among the candidates, after its own token before.

        A token that is no candidate takes the last one's place. Slots count as the objective says. The rest of the
        drafter gets no gradient from it; only the norm for clipping is that of both.

        Memory: the LM head's rows of all candidates, in fp32.
        """
        rows = scorer.rows
        labels = found.blocks.labels
        own = rows.index(labels)[..., 1:, None]
        index = scores.candidates[..., 1:, :].clamp_min(0)  # -1 where nothing is scored
        is_missing = (index != own).all(-1, keepdim=True)
        index = torch.cat([index[..., :-1], torch.where(is_missing, own, index[..., -1:])], dim=-1)
        hidden = found.hidden[..., 1:, :].detach()
        logits = candidate_logits(hidden, rows.head, index)
        with scorer.autocast():
            queries = self.network.queries(labels[..., :-1, None], hidden)
            added = self.network(queries, rows.tokens(index))[..., 0, :]
        place = (index == own).int().argmax(-1)
        losses = nn.functional.cross_entropy((logits + added).movedim(-1, 1), place, reduction="none")
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
        is_small = hidden_size < 1024
        return cls(
            top_k=config.selector_candidates or (8 if is_small else 16),
            rank=config.selector_width or (64 if is_small else 256),
        )

    def options(self, hidden_size: int) -> JsonObject:
        """See `SelectorSizes`."""
        return {"selector_candidates": self.top_k, "selector_width": self.rank}


SIZES = CandidateSelectorSizes
