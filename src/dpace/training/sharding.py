"""Train a drafter whose weights, gradients and moments are spread over the ranks (FSDP2).

Accelerate's own configuration asks for it: `accelerate launch --use_fsdp --fsdp_version 2`, or a file of its settings.
"""

import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dpace.system import ranks

USE_FSDP = "ACCELERATE_USE_FSDP"
"""Variable by which `accelerate launch` asks its processes for FSDP."""


def wants_shards() -> bool:
    """Return whether accelerate's configuration asks for FSDP2; a single rank always has all weights.

    Raises:
        ValueError: DeepSpeed, the first version of FSDP, or an option of it that dpace does not have.
    """
    has_fsdp = parse_flag_from_env(USE_FSDP) and ranks.num_ranks() > 1
    # What the launcher's variables ask for beside it.
    is_asked = {"DeepSpeed": parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")}
    if has_fsdp:
        is_asked["fsdp_version 1"] = os.environ.get("FSDP_VERSION") != "2"
        is_asked["fsdp_offload_params"] = parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
        is_asked["fsdp_activation_checkpointing"] = parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
    for name in is_asked:
        if is_asked[name]:
            raise ValueError(
                f"accelerate's configuration asks for {name}, which dpace does not have; start with `torchrun`, or "
                "with `accelerate launch --use_fsdp --fsdp_version 2`, and take --train.gradient-checkpointing"
            )
    return has_fsdp


def shard(model: Any) -> Any:
    """Spread a drafter over all ranks, in place: each layer by itself, and the rest together; return it.

    Memory: a rank's share of weights, gradients and moments, and the whole weights of a layer and of the rest while
    they compute. Under bf16 autocast the layers' bf16 weights are kept from forward to backward.
    """
    mesh = init_device_mesh(model.device.type, (ranks.num_ranks(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@torch.no_grad()
def copy_weights(source: nn.Module, to: nn.Module) -> None:
    """Copy the weights of a sharded drafter into a whole one, or back; all ranks must be here.

    Memory: one tensor beyond both.
    """
    # This works both ways, since `whole` and `take_share` leave alone what is whole.
    for parameter, copied in zip(source.parameters(), to.parameters(), strict=True):
        copied.copy_(take_share(ranks.whole(parameter), copied))


def take_share(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Take this rank's share of a tensor, as `like` is spread; all of it where `like` is whole."""
    if not isinstance(like, DTensor):
        return whole
    # Each rank has the whole tensor, so none sends a share to the others (`src_data_rank`).
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
