"""How a target's weights are spread over the ranks of a training, so that none needs room for all.

transformers reads the files: each rank reads its own share of each tensor. The table of the embedding and that of the
LM head are whole on each rank, since the drafter's own steps need them.
"""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.distributed.configuration_utils import DistributedConfig

from dpace import ranks
from dpace.config import TargetShard
from dpace.probe import find_layers

MOST_KEPT = 1.5
"""Most that a rank may keep of the layers, relative to an even share."""


def distribution(shard: TargetShard, model_class: Any, config: Any) -> DistributedConfig | None:
    """Say how `from_pretrained` is to spread a model; None where a rank has all of it.

    Args:
        shard: `fsdp` gathers a decoder layer where it runs and frees it afterwards; `tp` splits each matrix as
            transformers' plan for the class says.
        model_class: an auto class of transformers.
        config: of the model.

    Raises:
        ValueError: `tp` over a number of ranks that does not divide the heads.
    """
    num_ranks = ranks.num_ranks()
    if shard == "none" or num_ranks == 1:
        return None
    ranks.barrier()  # joins the group, with the backend of this machine
    text = config.get_text_config(decoder=True)
    if shard == "tp":
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        if heads % num_ranks:
            raise ValueError(
                f"--train.target-shard tp splits the target's {heads} heads of keys and values over the {num_ranks} "
                "ranks, which must divide them; start as many, or take fsdp"
            )
        return DistributedConfig(tp_size=num_ranks, tp_plan="auto")
    with torch.device("meta"):
        model = model_class.from_config(config)
    layers = find_layers(model, model.get_decoder(), text)
    name = next(name for name, module in model.named_modules() if module is layers)
    return DistributedConfig(fsdp_size=num_ranks, fsdp_plan={f"{name}.*": "free_full_weight"})


def keep_tables(model: Any) -> None:
    """Gather all but the decoder layers, and let them stay whole.

    The model's `state_dict` must not be asked for afterwards: it shards them again.

    Raises:
        ValueError: transformers left more of the layers on each rank than 1.5 times its share.
    """
    model.requires_grad_(False)
    layers = find_layers(model, model.get_decoder(), model.config.get_text_config(decoder=True))
    sizes = [(len(ranks.local(p).flatten()), p.numel()) for p in layers.parameters()]
    kept, total = (sum(column) for column in zip(*sizes, strict=True))
    if kept * ranks.num_ranks() > MOST_KEPT * total:
        raise ValueError(
            f"--train.target-shard leaves {kept / total:.0%} of the layers of {type(model).__name__} on each of "
            f"{ranks.num_ranks()} ranks: transformers has no plan that splits them; take fsdp, or none"
        )
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if isinstance(module, FSDPModule) and id(module) not in inside:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
