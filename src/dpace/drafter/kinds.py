"""The kinds of drafters; what each adds to DFlash's network is in a file of its own.

The networks are in `dpace.modeling_dflash`, which is copied beside the weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dpace.drafter import dflash, lilicorr
from dpace.drafter.dflash import Draft, Parts


class Kind(NamedTuple):
    """What is known of a kind of drafters."""

    architecture: str
    """Name of its network in published configs."""
    tensors: Callable[[Parts], dict[str, tuple[str, str]]]
    """Returns axes and llama.cpp's name of every tensor, by its published name."""
    config_keys: Callable[[Any], dict[str, Any]]
    """Returns what it adds to `dflash_config`, for a `DrafterSpec`."""
    propose: Callable[..., Draft]
    """Makes a draft from hidden states, see `dflash.propose`."""


KINDS = {
    "dflash": Kind("DFlashDraftModel", dflash.tensors, dflash.config_keys, dflash.propose),
    "dflash2": Kind("DFlash2DraftModel", dflash.tensors, dflash.config_keys, dflash.propose),
    "lilicorr": Kind("LiLiCorrDraftModel", lilicorr.tensors, lilicorr.config_keys, lilicorr.propose),
}
