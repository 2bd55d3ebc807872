"""Faster grouped-query attention, for few queries over many keys.

Query heads that share keys and values become rows of one product. `grouped_attention` is registered with transformers,
and `group_heads` lets a model use it.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_heads"
"""Name of this attention in transformers' registries."""
EXACT = "grouped_heads_in_fp64"
"""Name of the same in fp64."""
MAX_QUERIES = 64
"""Largest number of queries handled here; more gain nothing, and their mask for all heads takes memory."""
ALIGNMENT = 16
"""Columns of which a mask's rows have a multiple, as torch's attention on a GPU needs it."""


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute the attention of transformers' `sdpa` without a copy of keys and values per query head.

    `sdpa` makes that copy whenever there are several queries. With one query a head, torch's kernel is also several
    times slower in bf16 than with a few rows, and the heads of a group are such rows. Three cases are left to `sdpa`:
    prompts (many queries, or several queries without a mask), heads with keys of their own, and masks that differ by
    head.

    Memory: the mask once for each head of a group.

    Args:
        module: the attention layer.
        query: "batch head query dim".
        key: "batch key_head key dim"; `head` is a multiple of `key_head`.
        value: shaped as `key`.
        attention_mask: "batch 1 query key", True for visible or added to the scores.
        kwargs: as transformers passes them.

    Returns:
        "batch query head dim", and no attention weights.
    """
    heads, queries = query.shape[1:3]
    groups = heads // key.shape[1]
    is_shared = queries == 1  # without a mask it sees all keys; several queries would need a causal one
    if attention_mask is not None:
        is_shared = attention_mask.shape[1:3] == (1, queries)
    has_more = kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None
    if groups == 1 or queries > MAX_QUERIES or not is_shared or has_more:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend_in_groups(query, key, value, attention_mask, kwargs.get("scaling")), None


def exact_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute `grouped_attention` in fp64, and round its result to the dtype of the queries.

    In fp32 the order of the sums, and so the rounding, depends on the number of tokens that are read together, and
    layers in 8 bits make steps of such differences. Those of fp64 are a hundred million times smaller: the rounded
    result is the same but for a rare last bit, which 8 bits round away nearly always.

    Arguments as in `grouped_attention`.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.double()
    attended, _ = grouped_attention(module, query.double(), key.double(), value.double(), attention_mask, **kwargs)
    return attended.to(query.dtype), None


def make_causal_mask(rows: Tensor, num_keys: int) -> Tensor:
    """Make the mask of a text's last tokens, which see all before them and themselves.

    Flash attention knows this mask and shares long keys among a GPU's blocks of threads. A mask of numbers takes a
    kernel that has one block for each key head, which at 8,000 keys leaves most of the GPU idle.

    Args:
        rows: "batch new hidden", of the last tokens.
        num_keys: number of all tokens.

    Returns:
        torch's `CausalBias` where there is such a kernel, else "1 1 new key", added to the scores.
    """
    num_new = rows.shape[1]
    if has_causal_kernel(rows):
        return causal_lower_right(num_new, num_keys)
    # Row `i` is the token of number `num_keys - num_new + i`; above this diagonal are the tokens after it.
    return rows.new_full((1, 1, num_new, num_keys), -torch.inf).triu_(num_keys - num_new + 1)


def has_causal_kernel(rows: Tensor) -> bool:
    """Return whether flash attention runs on these rows: on CUDA in 16 bits, on Ampere or a later GPU."""
    is_on_cuda = rows.device.type == "cuda" and rows.element_size() == 2
    return is_on_cuda and torch.cuda.get_device_capability(rows.device) >= (8, 0)


def attend_in_groups(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Attend with the query heads of a group as rows of one product.

    Shapes are as in `grouped_attention`; the mask's `query` axis may also be 1, where all queries see the same keys.
    With a `CausalBias`, in which the rows of a group would differ, and with many queries the kernel itself shares keys
    and values.
    """
    attend = nn.functional.scaled_dot_product_attention
    batch = query.shape[0]  # len() of a tensor is slow
    heads, queries = query.shape[1:3]
    if isinstance(mask, CausalBias) or queries > MAX_QUERIES:
        return attend(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
    # (batch, key_head, group x query, dim): the heads that share keys stand next to one another.
    rows = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    if mask is not None and mask.shape[2] > 1:
        mask = _repeat_mask(mask, heads // key.shape[1], query.dtype)
    elif mask is not None and (query.device.type != "cpu" or mask.dtype not in (torch.bool, query.dtype)):
        mask = _repeat_mask(mask, 1, query.dtype)  # its one row is broadcast, but has to be aligned
    out = attend(rows, key, value, attn_mask=mask, scale=scale)
    if queries == 1:
        return out.reshape(batch, 1, heads, -1)
    # Back to (batch, query, key_head, group, dim).
    by_query = out.view(batch, key.shape[1], -1, queries, out.shape[-1]).permute(0, 3, 1, 2, 4)
    return by_query.reshape(batch, queries, heads, -1)


def _repeat_mask(mask: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """Repeat a mask for the query heads of a group, in the form that is added to scores.

    On a GPU its rows begin at multiples of `ALIGNMENT`: otherwise torch would copy it into such a form in each layer.

    Results are kept in an attribute of the mask, because all layers of a pass receive the same mask. Inside
    `torch.compile` nothing is kept: the compiler sees that all layers repeat the same.
    """
    is_compiling = torch.compiler.is_compiling()
    repeated_masks = {} if is_compiling else vars(mask).setdefault("repeated", {})
    if num_groups not in repeated_masks:
        repeated = mask.repeat(1, 1, num_groups, 1)
        if repeated.dtype == torch.bool:
            repeated = torch.zeros(repeated.shape, dtype=dtype, device=mask.device).masked_fill(~repeated, -torch.inf)
        repeated = repeated.to(dtype)
        if mask.device.type != "cpu" and not is_compiling:
            # A view of padded rows: the columns are the same, and the rows are farther apart in memory.
            columns = mask.shape[3]
            repeated = nn.functional.pad(repeated, (0, -columns % ALIGNMENT))[..., :columns]
        repeated_masks[num_groups] = repeated
    return repeated_masks[num_groups]


for name, attention in ((NAME, grouped_attention), (EXACT, exact_attention)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def group_heads(model: PreTrainedModel, name: str = NAME) -> bool:
    """Replace `sdpa` by `grouped_attention`, or `EXACT`, in the decoder of a model; return whether it was done.

    Left as they are: other implementations; models without a decoder of transformers, such as drafters; and models
    whose code asks for `sdpa` by name, as sparse attention does.
    """
    decoder: Any = model.get_decoder()
    is_possible = (
        isinstance(decoder, PreTrainedModel)
        and decoder.config._attn_implementation == "sdpa"
        and decoder._can_set_attn_implementation()
        # The model's code must not compare the name: it would take another path than for `sdpa`.
        and '"sdpa"' not in inspect.getsource(sys.modules[type(decoder).__module__])
    )
    if is_possible:
        decoder.set_attn_implementation(name)
    return is_possible
