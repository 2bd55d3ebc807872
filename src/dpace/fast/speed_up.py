"""The entry point of `dpace.fast`: make a loaded model faster, in place, with the same results."""

from typing import NamedTuple

from transformers import PreTrainedModel

from dpace.fast.attention import group_heads
from dpace.fast.fusion import fuse_layers
from dpace.fast.packing import pack_linears
from dpace.modeling_dflash import DFlashDraftModel


class SpeedUp(NamedTuple):
    """The changes made to a model."""

    is_packed: bool
    """Whether linear layers multiply with copies of their weights in a faster layout."""
    is_grouped: bool
    """Whether attention reads keys and values once for all query heads that share them."""
    is_fused: bool
    """Whether decoder layers run in fewer operations."""


def speed_up(model: PreTrainedModel) -> SpeedUp:
    """Make a model faster on its device, in eval mode; weights are packed on a CPU only.

    Quantized layers stay as they are. So do models with accelerate's hooks, which move what a part reads to its device.

    Memory: on a CPU copies of the weights, see `dpace.fast.packing.pack_linears`.
    """
    if any("_hf_hook" in vars(module) for module in model.modules()):
        return SpeedUp(False, False, False)
    model.eval()
    has_own_attention = isinstance(model, DFlashDraftModel)
    return SpeedUp(pack_linears(model), not has_own_attention and group_heads(model), fuse_layers(model))
