"""The DFlash network, which computes hidden states of blocks from the target's features.

`save_pretrained` copies this file beside the weights, so that transformers runs the network that was trained
(`trust_remote_code=True`). It therefore imports torch and transformers only.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)


class DFlashAttention(nn.Module):
    """Attention of block tokens to the target's features and to each other.

    Keys and values of both use the same projections.
    """

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, hidden, context, rope, mask, cache: Cache | None):
        """Compute the attention's output.

        Shapes are those of `DFlashDraftModel.forward`; `context` are the features after `fc` and their norm.
        """
        keys_from = torch.cat([context, hidden], dim=1)
        q = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        k = self.k_norm(self.k_proj(keys_from).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v = self.v_proj(keys_from).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        cos, sin = (x[:, None] for x in rope)
        k = k * cos + rotate_half(k) * sin
        cos, sin = cos[..., -q.shape[2] :, :], sin[..., -q.shape[2] :, :]
        q = q * cos + rotate_half(q) * sin
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the norms give fp32 and the projections bf16
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if mask is None or isinstance(mask, Tensor):
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            out = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DFlashLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer; the features enter its attention without the input norm."""

    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden, context, rope, mask, cache):
        """Add attention and feed-forward to `hidden`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), context, rope, mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def refuse_variants(config: Mapping[str, Any]) -> None:
    """Refuse the config of a drafter that this network would compute wrongly.

    Raises:
        ValueError: sliding or causal attention, biases, or another activation.
    """
    known = {"attention_bias": False, "is_causal": False, "hidden_act": "silu"}
    unknown = {name: config.get(name) for name in known if config.get(name) not in (None, known[name])}
    kinds = [kind for kind in config.get("layer_types") or () if kind != "full_attention"]
    if kinds:
        unknown["layer_types"] = config["layer_types"]
    if (config.get("dflash_config") or {}).get("causal"):
        unknown["dflash_config.causal"] = True
    if unknown:
        raise ValueError(
            f"the drafter's config has {unknown}; this network supports only full attention in both directions, "
            "without biases and with silu: serve this drafter with the project that trained it"
        )


class DFlashDraftModel(Qwen3PreTrainedModel):
    """Qwen3 layers over `[anchor, mask, ...]` that attend to the target's features.

    It owns `fc`, `hidden_norm`, the layers and `norm`; the embedding and the LM head are the target's. The arguments of
    `forward` are named as in transformers' DFlash generation, which takes this class as `assistant_model`.

    Raises:
        ValueError: a config without block size, mask token or layer ids, or of a variant that this network does not
            support.

    Source: DFlash (arXiv 2602.06036), section 4; checkpoint layout of z-lab/dflash.
    """

    config_class = Qwen3Config
    _no_split_modules = ["DFlashLayer"]

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        published = getattr(config, "dflash_config", None) or {}
        for key in ("block_size", "mask_token_id", "target_layer_ids"):
            value = published.get(key, getattr(config, key, None))
            if value is None:
                raise ValueError(
                    f"the drafter's config has no {key}, neither in dflash_config nor at the top level; "
                    "copy it from where the drafter was trained"
                )
            setattr(config, key, value)
        refuse_variants(config.to_dict())
        self.layers = nn.ModuleList(DFlashLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.post_init()

    def forward(
        self, noise_embeds, context_hidden_states, position_ids, attention_mask=None, cache: Cache | None = None, **_
    ) -> BaseModelOutput:
        """Compute the hidden states of blocks.

        Args:
            noise_embeds: "batch query hidden", target embeddings of the slots of one or more blocks.
            context_hidden_states: "batch context feature", features of the tokens that are not in the cache yet.
            position_ids: "batch new", absolute positions of the context, then of the slots (`new = context + query`).
            attention_mask: a dense mask over all keys (True: visible), a `BlockMask` of flex_attention, or None where
                every slot sees everything, as when one block is drafted. A 2-D padding mask is also accepted.
            cache: receives keys and values of the context and the slots; the caller removes those of the slots.

        Returns:
            `last_hidden_state`, "batch query hidden": the LM head's input.
        """
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].bool()
        context = self.hidden_norm(self.fc(context_hidden_states.to(self.dtype)))
        hidden = noise_embeds.to(self.dtype)
        rope = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, context, rope, attention_mask, cache)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
