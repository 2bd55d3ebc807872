"""All decoder layers of a model in one loop."""

from typing import Any

import torch
from torch import Tensor, nn

from dpace.fast.attention import MAX_QUERIES, NAME
from dpace.fast.cache import PreallocatedLayer, RaggedLayer
from dpace.fast.fusion import Source, can_be_used

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Decoder classes of transformers with the computation of `FusedStack`."""


class FusedStack:
    """All layers of a decoder in one loop for a decoding step.

    Results are those of the decoder's own code: bitwise on a CPU, and up to rounding elsewhere.

    Args:
        decoder: one of `DECODERS`, whose layers are fused.
    """

    def __init__(self, decoder: Any):
        self.decoder, self.layers = decoder, list(decoder.layers)
        own = [(decoder.layers, name) for name in decoder.layers._modules]
        self.source = Source(own, [layer.fused.source for layer in self.layers])

    def run(self, token_ids: Tensor, cache: Any, mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
        """Compute the LM head's input, "batch new hidden".

        Returns None where the decoder's own code has to run, as for prompts.

        Args:
            token_ids: "batch new".
            cache: made by `dpace.fast.cache`, with full attention in all layers.
            mask: "batch 1 new key", added to the scores; by default each token sees those before it and itself.
            position_ids: "batch new"; by default those behind the tokens in the cache.
        """
        decoder, num_new = self.decoder, token_ids.shape[1]
        embedding = decoder.embed_tokens.weight
        is_step = num_new <= MAX_QUERIES and decoder.config._attn_implementation == NAME and not decoder.training
        is_step = is_step and _is_ours(cache) and can_be_used(embedding, embedding.dtype) and self.source.is_same()
        if not is_step or decoder._forward_hooks or decoder._forward_pre_hooks:
            return None
        hidden = nn.functional.embedding(token_ids, embedding)
        if mask is None or position_ids is None:
            num_before = cache.layers[0].get_seq_length()
            if position_ids is None:
                position_ids = torch.arange(num_before, num_before + num_new, device=hidden.device)[None]
            if mask is None and num_new > 1:
                mask = hidden.new_zeros(1, 1, num_new, num_before + num_new)
                mask[..., num_before:] = hidden.new_full((num_new, num_new), -torch.inf).triu_(1)
        rope = decoder.rotary_emb(hidden, position_ids)
        rotation = self.layers[0].fused.rotation(rope, decoder.config)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            if layer._forward_hooks or layer._forward_pre_hooks:
                hidden = layer(hidden, mask, position_ids=position_ids, cache=cache, position_embeddings=rope)
                continue
            hidden = layer.fused.step(hidden, rotation, mask, layer_cache)
        return decoder.norm(hidden)


def stack_layers(decoder: nn.Module) -> FusedStack | None:
    """Make the stack of a decoder; None unless it is one of `DECODERS` and all its layers are fused."""
    layers: Any = getattr(decoder, "layers", ())
    is_known = type(decoder).__name__ in DECODERS and all(getattr(layer, "fused", None) for layer in layers)
    return FusedStack(decoder) if is_known else None


def _is_ours(cache: Any) -> bool:
    """Say whether all layers of a cache hold all tokens, in buffers of `dpace.fast.cache`."""
    return cache is not None and all(type(layer) in (PreallocatedLayer, RaggedLayer) for layer in cache.layers)
