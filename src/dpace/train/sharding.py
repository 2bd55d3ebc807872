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
RESHARD = "FSDP_RESHARD_AFTER_FORWARD"


def wants_shards() -> bool:
    """Return whether accelerate's configuration asks for FSDP2; a single rank always has all weights.

    Raises:
        ValueError: DeepSpeed, the first version of FSDP, or an option of it that dpace does not have.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "accelerate's configuration asks for DeepSpeed, whose checkpoints dpace cannot write; choose FSDP with "
            "fsdp_version 2, or start with `torchrun`, which gives each process a whole drafter"
        )
    if not parse_flag_from_env(USE_FSDP) or ranks.num_ranks() == 1:
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate's configuration has fsdp_version {version}, and dpace trains with 2 only; start with "
            "`accelerate launch --use_fsdp --fsdp_version 2`"
        )
    for name, way in (
        ("fsdp_offload_params", "leave it out: the weights are spread over the ranks instead"),
        ("fsdp_activation_checkpointing", "take --train.gradient-checkpointing"),
    ):
        if parse_flag_from_env(name.upper()):
            raise ValueError(f"accelerate's configuration sets {name}, which dpace does not have; {way}")
    return True


def shard(model: Any) -> None:
    """Spread a drafter over all ranks, in place: each layer by itself, and the rest together.

    Memory: a rank's share of weights, gradients and moments, and the whole weights of a layer and of the rest while
    they compute. Under bf16 autocast the layers' bf16 weights are kept from forward to backward.
    """
    mesh = init_device_mesh(model.device.type, (ranks.num_ranks(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=parse_flag_from_env(RESHARD, True))
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def copy_weights(source: nn.Module, to: nn.Module) -> None:
    """Copy the weights of a sharded drafter into a whole one, or back; all ranks must be here.

    Memory: one tensor beyond both.
    """
    for parameter, copied in zip(source.parameters(), to.parameters(), strict=True):
        copied.copy_(take_share(ranks.whole(parameter), copied))


def take_share(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Take this rank's share of a tensor, as `like` is spread; all of it where that is whole."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
