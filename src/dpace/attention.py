"""The target's attention on a CPU, for few queries over many keys: query heads that share keys and values are rows of one product."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_sdpa"
"""Of the implementation, in transformers' registries."""


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Do what `sdpa` of transformers does, without its copy of keys and values for each query head where there is a mask.

    With one query a head, torch's kernel is also several times slower in bf16 than with a few, which the heads of a group are.
    Whatever is not that case is left to `sdpa`: a prompt without a cache, heads with keys of their own, a mask for each head.

    Args:
        module: the attention layer.
        query: "batch head query dim".
        key: "batch key_head key dim"; `head` is a multiple of `key_head`.
        value: shaped as `key`.
        attention_mask: "batch 1 query key", True for visible or added to the scores.
        kwargs: as transformers gives them.

    Returns:
        "batch query head dim", and no attention weights.
    """
    batch, heads, queries, dim = query.shape
    groups = heads // key.shape[1]
    is_shared = queries == 1 if attention_mask is None else attention_mask.dim() == 4 and attention_mask.shape[1] == 1
    is_more = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in ("softcap", "position_bias"))
    if groups == 1 or not is_shared or is_more:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
    rows = query.reshape(batch, -1, groups * queries, dim)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def group_heads(model: PreTrainedModel) -> None:
    """Let a model on a CPU that uses `sdpa` use `grouped_attention`; others stay as they are."""
    config: Any = model.config.get_text_config(decoder=True)
    if model.device.type == "cpu" and config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
