"""The one door to this room: make a loaded model faster, in place, without changing what it computes."""

from typing import NamedTuple

from transformers import PreTrainedModel

from dpace.fast.attention import group_heads
from dpace.fast.fusion import fuse_layers
from dpace.fast.packing import pack_linears
from dpace.modeling_dflash import DFlashDraftModel


class SpeedUp(NamedTuple):
    """What was done to a model."""

    is_packed: bool
    """Linear layers multiply with copies of their weights in a faster layout."""
    is_grouped: bool
    """Attention reads keys and values once for all query heads that share them."""
    is_fused: bool
    """Decoder layers run in fewer operations."""


def speed_up(model: PreTrainedModel) -> SpeedUp:
    """Do what makes a model faster on its device; today that is on a CPU only.

    Memory: copies of the weights, see `dpace.fast.packing.pack_linears`.
    """
    has_own_attention = isinstance(model, DFlashDraftModel)
    return SpeedUp(pack_linears(model), not has_own_attention and group_heads(model), fuse_layers(model))
