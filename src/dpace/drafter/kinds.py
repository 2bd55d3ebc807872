"""The kinds of drafters; what each adds to DFlash's network is in a file of its own.

The networks are in `dpace.modeling_dflash`, which is copied beside the weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dpace.drafter import dflash, lilicorr
from dpace.drafter.selector import Selector


class Kind(NamedTuple):
    """What is known of a kind of drafters."""

    architecture: str
    """Name of its network in published configs."""
    config_keys: Callable[[Any], dict[str, Any]] = dflash.config_keys
    """Returns what it adds to `dflash_config`, for a `DrafterSpec`."""
    selector: type[Selector] = Selector
    """How its drafts are chosen."""


KINDS = {
    "dflash": Kind("DFlashDraftModel"),
    "dflash2": Kind("DFlash2DraftModel"),
    "lilicorr": Kind("LiLiCorrDraftModel", lilicorr.config_keys, lilicorr.LatticeSelector),
}
