"""The entry point of `dpace.fast`: make a loaded model faster, in place, with the same results."""

from transformers import PreTrainedModel

from dpace.fast.attention import group_heads
from dpace.fast.fusion import fuse_layers
from dpace.fast.packing import pack_linears
from dpace.modeling_dflash import DFlashDraftModel


def speed_up(model: PreTrainedModel) -> None:
    """Make a model faster on its device, in eval mode.

    On a CPU linear layers are packed. Attention of the target reads keys and values once for all query heads that share
    them, and decoder layers run in fewer operations.

    Quantized layers stay as they are. So do models with accelerate's hooks, which move what a part reads to its device.

    Memory: on a CPU copies of the weights, see `dpace.fast.packing.pack_linears`.
    """
    if any("_hf_hook" in vars(module) for module in model.modules()):
        return
    pack_linears(model.eval())
    # A drafter's own attention already reads keys once for all heads of a group.
    if not isinstance(model, DFlashDraftModel):
        group_heads(model)
    # Last, because fusing layers replaces their packed weights.
    fuse_layers(model)
