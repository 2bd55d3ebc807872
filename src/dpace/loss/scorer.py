"""What the losses of a training are computed with, from its settings; see `dpace.training.loop.score_blocks`."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from dpace.config import LossConfig
from dpace.loss.loss import Weigh
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
