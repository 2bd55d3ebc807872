"""The target's attention on a CPU, for few queries over many keys: query heads that share keys and values are rows of one product."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_heads"
"""Of the implementation, in transformers' registries."""
MAX_QUERIES = 64
"""With more of them there is nothing to gain, and the mask of all heads takes memory."""


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Do what `sdpa` of transformers does, without the copy of keys and values that it makes for each query head of several queries.

    With one query a head, torch's kernel is also several times slower in bf16 than with a few, which the heads of a group are.
    Left to `sdpa` are prompts: many queries, or queries without a mask; heads with keys of their own; and masks that differ by head.

    Memory: the mask once for each head of a group.

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
    heads, queries = query.shape[1:3]
    groups = heads // key.shape[1]
    is_shared = queries == 1 if attention_mask is None else attention_mask.shape[1:3] == (1, queries)
    is_more = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in ("softcap", "position_bias"))
    if groups == 1 or queries > MAX_QUERIES or not is_shared or is_more:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend_in_groups(query, key, value, attention_mask, kwargs.get("scaling")), None


def attend_in_groups(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """The product that `grouped_attention` is; shapes as there, the mask's `query` being 1 where all of them see the same keys."""
    batch, heads, queries, _ = query.shape
    rows = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    if mask is not None and mask.shape[2] > 1:
        mask = _of_groups(mask, heads // key.shape[1], query.dtype)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()


def _of_groups(mask: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """A mask for the query heads of a group, as what is added to scores; kept at the mask, which all layers of a pass are given."""
    made = vars(mask).get("of_groups")
    if made is None or made.shape[2] != num_groups * mask.shape[2] or made.dtype not in (mask.dtype, dtype):
        made = mask.repeat(1, 1, num_groups, 1)
        if made.dtype == torch.bool:
            made = torch.zeros(made.shape, dtype=dtype, device=made.device).masked_fill(~made, -torch.inf)
        mask.of_groups = made  # pyright: ignore[reportAttributeAccessIssue]
    return made


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def group_heads(model: PreTrainedModel) -> bool:
    """Let the decoder of a model on a CPU use `grouped_attention` where it uses `sdpa`; say whether it does.

    Left as they are: other implementations, models without a decoder of transformers, such as drafters, and models whose code
    asks for `sdpa` by its name, as sparse attention does.
    """
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder.device.type != "cpu":
        return False
    if decoder.config._attn_implementation != "sdpa" or not decoder._can_set_attn_implementation():
        return False
    if '"sdpa"' in inspect.getsource(sys.modules[type(decoder).__module__]):
        return False
    decoder.set_attn_implementation(NAME)
    return True
