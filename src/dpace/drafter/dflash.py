"""DFlash and DFlash2: their tensors and config keys in each engine.

Source: DFlash (arXiv 2602.06036); DFlash2, z-lab/dflash.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Tensors = Mapping[str, tuple[str, str]]
"""Published name of each tensor, its axes, and llama.cpp's name."""

TENSORS: Tensors = {
    "fc.weight": ("hidden feature", "fc.weight"),
    "hidden_norm.weight": ("hidden", "enc.output_norm.weight"),
    "norm.weight": ("hidden", "output_norm.weight"),
}
LAYER_TENSORS: Tensors = {
    "layers.N.input_layernorm.weight": ("hidden", "blk.N.attn_norm.weight"),
    "layers.N.self_attn.q_proj.weight": ("query hidden", "blk.N.attn_q.weight"),
    "layers.N.self_attn.k_proj.weight": ("key hidden", "blk.N.attn_k.weight"),
    "layers.N.self_attn.v_proj.weight": ("key hidden", "blk.N.attn_v.weight"),
    "layers.N.self_attn.o_proj.weight": ("hidden query", "blk.N.attn_output.weight"),
    "layers.N.self_attn.q_norm.weight": ("head", "blk.N.attn_q_norm.weight"),
    "layers.N.self_attn.k_norm.weight": ("head", "blk.N.attn_k_norm.weight"),
    "layers.N.post_attention_layernorm.weight": ("hidden", "blk.N.ffn_norm.weight"),
    "layers.N.mlp.gate_proj.weight": ("inner hidden", "blk.N.ffn_gate.weight"),
    "layers.N.mlp.up_proj.weight": ("inner hidden", "blk.N.ffn_up.weight"),
    "layers.N.mlp.down_proj.weight": ("hidden inner", "blk.N.ffn_down.weight"),
}
"""`query` is heads x head_dim, `key` the same for key heads."""
SELECTOR_TENSORS: Tensors = {
    "candidate_selector.predecessor_codebook": ("vocab rank", "selector_predecessor.weight"),
    "candidate_selector.successor_codebook": ("vocab rank", "selector_successor.weight"),
    "candidate_selector.hidden_projection.weight": ("rank hidden", "selector_hidden.weight"),
}
CONVOLUTION_TENSORS: Tensors = {
    "layers.N.attention_conv.base_kernel": ("side tap hidden", "blk.N.attn_conv_base"),
    "layers.N.attention_conv.kernel_projection.weight": ("kernel hidden", "blk.N.attn_conv_proj.weight"),
    "layers.N.mlp_conv.base_kernel": ("side tap hidden", "blk.N.ffn_conv_base"),
    "layers.N.mlp_conv.kernel_projection.weight": ("kernel hidden", "blk.N.ffn_conv_proj.weight"),
}
"""`kernel` is sides x taps x groups of channels."""
TABLES: Tensors = {
    "embed_tokens.weight": ("vocab hidden", "token_embd.weight"),
    "lm_head.weight": ("choice hidden", "output.weight"),
    "d2t": ("choice", "d2t"),
}
"""Tensors that drafters may have of their own: embedding, LM head, and the tokens of a head with fewer rows."""
CONVOLUTION_KEYS = ("conv_kernel_size", "conv_group_size")


class Parts(NamedTuple):
    """What a drafter's network has, as its tensors or its config say."""

    num_layers: int
    has_taps: bool
    """Whether it has DFlash2's convolutions; without a head they come with a selector."""
    num_head_layers: int
    """Layers of its LiLiCorr head; 0 without one."""
    has_projection: bool
    """Whether the head is narrower than the drafter, and so has `token_proj`."""

    @property
    def kind(self) -> str:
        """Its name in `dpace.drafter.kinds`."""
        if self.num_head_layers:
            return "lilicorr"
        return "dflash2" if self.has_taps else "dflash"


def numbered(tensors: Tensors, num_layers: int) -> dict[str, tuple[str, str]]:
    """Name the tensors of each layer, whose number is `N` in a table."""
    return {
        name.replace("N", str(layer)): (axes, gguf.replace("N", str(layer)))
        for layer in range(max(1, num_layers))
        for name, (axes, gguf) in tensors.items()
    }


def tensors(parts: Parts) -> dict[str, tuple[str, str]]:
    """Return axes and llama.cpp's name of every tensor but `TABLES`, by its published name.

    Nothing is permuted for llama.cpp, because the drafter's rotary embedding is NeoX's.
    """
    selector = SELECTOR_TENSORS if parts.kind == "dflash2" else {}
    convolutions = CONVOLUTION_TENSORS if parts.has_taps else {}
    return numbered({**TENSORS, **selector, **LAYER_TENSORS, **convolutions}, parts.num_layers)


def config_keys(spec: Any) -> dict[str, Any]:
    """Return what convolutions add to `dflash_config`.

    llama.cpp wants k (k + 1) <= hidden size of the selector.
    """
    if not spec.conv_kernel_size:
        return {}
    keys = {name: getattr(spec, name) for name in CONVOLUTION_KEYS}
    if spec.head:
        return keys
    top_k = next((k for k in (16, 8, 4) if k * (k + 1) <= spec.hidden_size), 2)
    return {**keys, "selector_rank": 1, "selector_top_k": top_k}
