"""Find layers, embedding, LM head and rotary embedding of a model, or refuse the model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dpace.fast.packing import is_plain
from dpace.system.ledger import JsonObject
from dpace.target.head import LmHead


def find_layers(model: Any) -> nn.ModuleList:
    """Find the list of decoder layers.

    Raises:
        ValueError: there is none, or more than one.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    children = model.get_decoder().children()
    candidates = [child for child in children if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(candidates) != 1 or not candidates[0]:
        raise ValueError(
            f"{type(model).__name__} has {len(candidates)} lists of {count} decoder layers; choose a target made of "
            "embedding, exactly one such list, norm and LM head"
        )
    return candidates[0]


@torch.no_grad()
def find_tables(target: Any) -> tuple[float, LmHead]:
    """Run one token to find the scale of the embedding and the LM head of a `dpace.target.Target`.

    Raises:
        ValueError: the model applies more than a scale to its embedding, or more than a scale and a cap to its hidden
            states and logits; or it does not use the cache.
    """
    model = target.model
    name = type(model).__name__
    head = model.get_output_embeddings()
    _refuse_quantized_tables(model, head)
    if getattr(head, "bias", None) is not None and bool(head.bias.any()):
        raise ValueError(
            f"the LM head of {name} has a bias; dpace drafters share a head without one: choose another target"
        )
    seen = {}
    hooks = [
        target.layers[0].register_forward_pre_hook(
            lambda _module, args, kwargs: seen.update(first=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        target.decoder.register_forward_hook(lambda _module, _args, out: seen.update(last=out.last_hidden_state)),
    ]
    table = model.get_input_embeddings().weight
    token = torch.tensor([[target.config.vocab_size // 2]], device=table.device)
    cache = DynamicCache(config=target.config)
    try:
        seen["logits"] = model(token, cache=cache, use_cache=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    if all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers):
        raise ValueError(
            f"{name} keeps nothing in transformers' cache, so that it cannot go on from a text; choose another target"
        )
    first, last, logits = (seen[key].to(table.device).flatten().float() for key in ("first", "last", "logits"))
    weight = head.weight.to(table.device)  # a copy where the layers are spread over devices
    softcap = getattr(target.config, "final_logit_softcapping", None)
    if softcap is not None:
        logits = softcap * torch.atanh((logits / softcap).clamp(-0.999999, 0.999999))
    scale = _find_scale(model, first, table[token[0, 0]].float(), "input embedding")
    return scale, LmHead(weight, _find_scale(model, logits, weight.float() @ last, "LM head"), softcap)


def _refuse_quantized_tables(model: Any, head_module: Any) -> None:
    """Refuse an embedding or head that is no table of plain numbers."""
    for part, module in (("input embedding", model.get_input_embeddings()), ("LM head", head_module)):
        weight = getattr(module, "weight", None)
        if not is_plain(weight):
            raise ValueError(
                f"the {part} of {type(model).__name__} is quantized ({type(module).__name__}); drafters share it as a "
                "table of plain numbers: choose a checkpoint that quantizes the layers only"
            )


def _find_scale(model: Any, computed: Tensor, table: Tensor, part: str) -> float:
    """Compute the factor between the model's values and the plain table's; 1 where equal up to rounding."""
    ratio = float(computed @ table / (table @ table))
    is_exact = model.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    tolerance = 1e-3 if is_exact else 3e-2
    error = float((computed - ratio * table).norm() / computed.norm())
    if not error <= tolerance:
        raise ValueError(
            f"the {part} of {type(model).__name__} is more than a scaled table (relative difference "
            f"{error:.2g}); dpace drafters can share scaled tables only: choose another target"
        )
    return 1.0 if abs(ratio - 1) < tolerance else ratio


def rope_of(config: Any) -> JsonObject:
    """Return the drafter's rotary embedding: that of the target's full-attention layers.

    The published layout rotates whole heads. For a target that rotates a part of each, or none, that is the default
    rotation with the target's base, as in the published drafters of Qwen3.5 and later.
    """
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    rope = dict(rope.get("full_attention", rope))
    is_partial = rope.pop("partial_rotary_factor", None) not in (None, 1.0)
    if is_partial or rope.get("rope_type", "default") == "default" or any(name.startswith("mrope") for name in rope):
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope
