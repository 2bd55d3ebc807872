"""What training minimizes: the frozen-head loss, its scores by tile, and the objectives."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpace.loss.loss import REDUCTIONS as REDUCTIONS
    from dpace.loss.loss import HeadOutput as HeadOutput
    from dpace.loss.loss import Slots as Slots
    from dpace.loss.loss import Weigh as Weigh
    from dpace.loss.loss import block_loss as block_loss
    from dpace.loss.loss import count_items as count_items
    from dpace.loss.loss import frozen_head_nll as frozen_head_nll
    from dpace.loss.loss import frozen_head_nll_reference as frozen_head_nll_reference


def __getattr__(name: str) -> Any:
    """Load a name of `dpace.loss.loss` when it is first used."""
    return getattr(import_module("dpace.loss.loss"), name)
