"""LiLiCorr, a selector that makes the slots of a draft agree.

Here are its sizes, tensors and config keys, its scores and its loss. Its network is `LiLiCorrNetwork` of
`dpace.modeling_dflash`.

Source: LiLiCorr (arXiv 2608.20530), as in NVIDIA's Model-Optimizer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpace.config import DrafterConfig
from dpace.drafter.lattice import BlockCandidates, Lattice, LatticeSelector, rows_after
from dpace.drafter.selector import SelectorSizes
from dpace.drafter.values import COPY_AGAIN, Index, LayerCount, Scale, StrictCount
from dpace.drafter.views import BlocksHidden
from dpace.loss import SlotScores, candidate_logits
from dpace.loss.scorer import Scorer
from dpace.system.ledger import JsonObject

CE_WEIGHT = 0.25
"""Weight of its cross-entropy beside the loss of the blocks, as published."""
OLDER_NAMES = {
    "feature_mlp.0": "feature_norm",
    "feature_mlp.1": "feature_mlp.up_proj",
    "feature_mlp.3": "feature_mlp.down_proj",
    "mlp.0": "mlp.up_proj",
    "mlp.2": "mlp.down_proj",
}
"""Names of parts of the network in older checkpoints, and the newer ones, without which vLLM 0.32 refuses it."""


class LiLiCorrSelector(LatticeSelector):
    """Scores neighbouring candidates by the network; the drafter's logits are not added to its scores."""

    def score(self, candidates: BlockCandidates) -> Float[Tensor, "block draft choice choice"]:
        """Take the network's scores; in the first slot all candidates have the score after the anchor."""
        embeds = candidates.rows.target.embed(candidates.tokens)
        start, pairs = self.network(embeds, candidates.log_probs, candidates.hidden, candidates.before)
        # "block candidate" to "block 1 before after", where the candidates before the first slot do not matter.
        first_slot = start[:, None, None].expand(-1, 1, start.shape[1], -1)
        return torch.cat([first_slot, pairs], dim=1)

    def add_loss(self, scores: SlotScores, drafted: BlocksHidden, scorer: Scorer) -> SlotScores:
        """Add the loss of the walk, in blocks all of whose slots are scored."""
        rows = scorer.rows
        blocks = drafted.blocks
        whole_blocks = drafted.whole_blocks
        if whole_blocks is None:
            whole_blocks = blocks.is_scored[..., 1:].flatten(0, 1).all(-1).nonzero()[:, 0]
        if not len(whole_blocks):  # a gradient of 0, since ranks wait for each other's
            nothing = sum(parameter.sum() * 0 for parameter in self.network.parameters())
            return scores._replace(losses=scores.losses + nothing)

        def pick_drafts(values: Tensor) -> Tensor:
            # "batch block slot ..." to "whole draft ...", without the anchors.
            return values.flatten(0, 1)[whole_blocks][:, 1:]

        hidden = pick_drafts(drafted.hidden)
        labels = pick_drafts(blocks.labels)
        index = pick_drafts(scores.candidates)
        with_label = torch.cat([index, rows.index(labels)[..., None]], dim=-1)
        logits = candidate_logits(hidden, rows.head, with_label)
        # The loss of the label is -log q[label], so log q[c] = logit[c] - logit[label] - loss: no sum over all tokens.
        log_probs = logits[..., :-1] - logits[..., -1:] - pick_drafts(scores.token_losses)[..., None]
        target_logits = None
        if drafted.target_hidden is not None:
            target_logits = candidate_logits(pick_drafts(drafted.target_hidden), rows.head, index)
        last_ids = blocks.labels.flatten(0, 1)[whole_blocks, 0]
        with scorer.autocast():
            before = drafted.before.flatten(0, 1)[whole_blocks]
            candidates = BlockCandidates(rows, rows.tokens(index), log_probs, hidden, last_ids, before)
            lattice = self.make_lattice(candidates)
        walk = walk_losses(lattice, labels, target_logits, scorer.loss.selector_penalty)
        losses = scores.losses.flatten().index_add(0, whole_blocks, walk)
        return scores._replace(losses=losses.view_as(scores.losses))


def walk_losses(
    lattice: Lattice,
    labels: Int[Tensor, "block draft"],
    target_logits: Float[Tensor, "block draft choice"] | None,
    penalty: float,
) -> Float[Tensor, " block"]:
    """Compute the loss of a walk that takes the target's tokens, in each block.

    It is a sum over the slots before the first whose token is no candidate. With `r` the softmax of a slot's scores
    after the target's token before, a slot adds `CE_WEIGHT * -log r[true]`, and `penalty` times
    `sum of r[j] * max(0, l[true] - l[j])`, where `l` are the target's logits: a wrong choice costs as much as the
    target dislikes it.

    Args:
        lattice: of whole blocks.
        labels: the target's tokens, as the lattice names its candidates.
        target_logits: the target's, of the candidates, without gradient; None without penalty.
        penalty: its weight.

    Source: LiLiCorr (arXiv 2608.20530), as in NVIDIA's Model-Optimizer.
    """
    is_true = lattice.candidates == labels[..., None]
    is_counted = is_true.any(-1).int().cumprod(-1)  # 0 from the first slot whose token is no candidate
    index = is_true.int().argmax(-1)
    log_probs = rows_after(lattice.scores, index).log_softmax(-1)
    losses = -CE_WEIGHT * log_probs.gather(-1, index[..., None])[..., 0]
    if target_logits is not None:
        worse = (target_logits.gather(-1, index[..., None]) - target_logits).clamp_min(0)
        losses = losses + penalty * (log_probs.exp() * worse).sum(-1)
    return (is_counted * losses).sum(-1)


@dataclass(frozen=True)
class LiLiCorrSizes(SelectorSizes):
    """Sizes and constants of a LiLiCorr selector."""

    name = "lilicorr"
    prefix = "lilicorr_"
    architecture = "LiLiCorrDraftModel"
    selector = LiLiCorrSelector
    reads = {"selector_candidates": "candidate_topk", "selector_width": "hidden_size", "selector_penalty": ""}
    older_names = OLDER_NAMES

    candidate_topk: StrictCount
    """Best tokens of each slot that it chooses from."""
    hidden_size: Index
    """Its width; 0 for the drafter's."""
    num_heads: StrictCount
    factor_dim: StrictCount
    """Length of the vectors whose products are the scores."""
    num_layers: LayerCount
    mlp_ratio: Scale
    vector_eps: Scale
    logit_scale: Scale

    @classmethod
    def chosen(cls, config: DrafterConfig, hidden_size: int) -> "LiLiCorrSizes":
        """Choose the sizes of a selector.

        Published ones are a quarter as wide as the drafter (1024 at 4096). There it is 3 % of a step. Next to a small
        target on a CPU it would be far more, so below 1024 a sixth is taken, 96 at 576, and 4 candidates.
        """
        num_candidates = 8
        width = hidden_size // 4
        if hidden_size < 1024:
            num_candidates = 4
            width = max(8, hidden_size // 48 * 8)  # a sixth, as a multiple of 8
        width = config.selector_width or width
        # As many heads as have 24 numbers each, 8 at most.
        num_heads = 1
        for count in (2, 4, 8):
            if width % count == 0 and width >= 24 * count:
                num_heads = count
        return cls(
            candidate_topk=config.selector_candidates or num_candidates,
            hidden_size=0 if width == hidden_size else width,
            num_heads=num_heads,
            factor_dim=width,
            num_layers=2,
            mlp_ratio=2.0,
            vector_eps=1e-4,
            logit_scale=8.0,
        )

    def check(self, hidden_size: int) -> None:
        """Refuse heads that do not divide the width.

        Raises:
            ValueError: names both.
        """
        width = self.hidden_size or hidden_size
        if width % self.num_heads:
            raise ValueError(
                f"lilicorr_num_heads is {self.num_heads}, expected a divisor of the selector's width, which is "
                f"{width}; {COPY_AGAIN}"
            )

    def config_keys(self) -> JsonObject:
        """Return what the selector adds to `dflash_config`; engines choose the network by the first two."""
        return {"projector_type": self.name, "lilicorr_enabled": True, **super().config_keys()}


SIZES = LiLiCorrSizes
