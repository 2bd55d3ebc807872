"""Names and axes of a drafter's tensors, in the published layout and in llama.cpp's."""

TENSORS = {
    "fc": (("hidden", "feature"), "fc"),
    "hidden_norm": (("hidden",), "enc.output_norm"),
    "norm": (("hidden",), "output_norm"),
}
LAYER_TENSORS = {
    "input_layernorm": (("hidden",), "attn_norm"),
    "self_attn.q_proj": (("query", "hidden"), "attn_q"),
    "self_attn.k_proj": (("key", "hidden"), "attn_k"),
    "self_attn.v_proj": (("key", "hidden"), "attn_v"),
    "self_attn.o_proj": (("hidden", "query"), "attn_output"),
    "self_attn.q_norm": (("head",), "attn_q_norm"),
    "self_attn.k_norm": (("head",), "attn_k_norm"),
    "post_attention_layernorm": (("hidden",), "ffn_norm"),
    "mlp.gate_proj": (("inner", "hidden"), "ffn_gate"),
    "mlp.up_proj": (("inner", "hidden"), "ffn_up"),
    "mlp.down_proj": (("hidden", "inner"), "ffn_down"),
}
"""Published name of each weight, its axes, and llama.cpp's name.

`query` is heads x head_dim, `key` the same for key heads.
"""
SELECTOR_TENSORS = {
    "candidate_selector.predecessor_codebook": (("vocab", "rank"), "selector_predecessor.weight"),
    "candidate_selector.successor_codebook": (("vocab", "rank"), "selector_successor.weight"),
    "candidate_selector.hidden_projection.weight": (("rank", "hidden"), "selector_hidden.weight"),
}
CONVOLUTION_TENSORS = {
    "attention_conv.base_kernel": (("side", "tap", "hidden"), "attn_conv_base"),
    "attention_conv.kernel_projection.weight": (("kernel", "hidden"), "attn_conv_proj.weight"),
    "mlp_conv.base_kernel": (("side", "tap", "hidden"), "ffn_conv_base"),
    "mlp_conv.kernel_projection.weight": (("kernel", "hidden"), "ffn_conv_proj.weight"),
}
"""The same of drafters with convolutions; `kernel` is sides x taps x groups of channels."""


def tensor_axes(num_layers: int, *, has_convolutions: bool) -> dict[str, tuple[str, ...]]:
    """Give the axes of every tensor of a drafter, by its published name."""
    return {name: axes for name, (axes, _) in _all_tensors(num_layers, has_convolutions).items()}


def gguf_names(num_layers: int, *, has_convolutions: bool) -> dict[str, str]:
    """Give llama.cpp's name of every tensor, by its published name.

    Nothing is permuted, because the drafter's rotary embedding is NeoX's.
    """
    return {name: theirs for name, (_, theirs) in _all_tensors(num_layers, has_convolutions).items()}


def _all_tensors(num_layers: int, has_convolutions: bool) -> dict[str, tuple[tuple[str, ...], str]]:
    tensors = {f"{name}.weight": (axes, f"{theirs}.weight") for name, (axes, theirs) in TENSORS.items()}
    of_layers = {f"{name}.weight": (axes, f"{theirs}.weight") for name, (axes, theirs) in LAYER_TENSORS.items()}
    if has_convolutions:
        tensors |= SELECTOR_TENSORS
        of_layers |= CONVOLUTION_TENSORS
    for layer in range(num_layers):
        for name, (axes, theirs) in of_layers.items():
            tensors[f"layers.{layer}.{name}"] = axes, f"blk.{layer}.{theirs}"
    return tensors
