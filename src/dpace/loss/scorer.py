"""The losses of drafted blocks with the settings of a training: hidden states come in, scores of the slots go out."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from dpace.blocks import Blocks
from dpace.config import LossConfig
from dpace.loss.loss import SlotScores, Weigh, frozen_head_nll
from dpace.target.draft_rows import DraftRows


@dataclass(frozen=True)
class Scorer:
    """What the losses of a training are computed with."""

    loss: LossConfig
    weigh: Weigh
    """Computes the weights."""
    rows: DraftRows
    """Rows of the target's LM head, for the tokens that the softmax covers."""
    needs_target_hidden: bool = False
    """Whether the losses read the input of the target's head, see `Recipe.needs_target_hidden`."""
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """In which the drafter's selector computes, as the rest of the drafter does when it is trained."""

    def score(
        self,
        hidden: Float[Tensor, "batch block slot hidden"],
        blocks: Blocks,
        target_hidden: Float[Tensor, "batch block slot hidden"] | None,
        *,
        num_candidates: int,
        scored_rows: Int[Tensor, " row"] | None = None,
    ) -> SlotScores:
        """Compute the weighted loss of each block.

        Args:
            hidden: the drafter's final hidden states.
            blocks: what they were drafted for.
            target_hidden: input of the target's head where it predicts each slot; None where no loss reads it.
            num_candidates: see `frozen_head_nll`, as the next one.
            scored_rows: numbers of the scored slots, where they are known.
        """
        return frozen_head_nll(
            hidden,
            self.rows.head,
            self.rows.index(blocks.labels),
            blocks.is_scored,
            scored_rows=scored_rows,
            weigh=self.weigh,
            token_loss=self.loss.token_loss,
            target_hidden=target_hidden if self.loss.needs_target_probs else None,
            chunk_bytes=self.loss.chunk_mib and self.loss.chunk_mib * 2**20,
            num_candidates=num_candidates,
        )
