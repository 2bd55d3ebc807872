"""The tensors of drafters, by the names of each engine, and the sizes of a head.

What comes in is what a drafter adds to DFlash's network: convolutions, a head. What goes out are names and axes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, Strict

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
LILICORR = "lilicorr."
"""Beginning of the names of the head's tensors and, with `_` for the point, of its config keys."""
HEAD_LINEARS = {
    "correlator hidden": "token_proj pass_hidden_proj context_proj",
    "five": "feature_norm",
    "correlator five": "feature_mlp.up_proj",
    "correlator correlator": "feature_mlp.down_proj layers.N.attn.out_proj",
    "wide correlator": "layers.N.mlp.up_proj",
    "correlator wide": "layers.N.mlp.down_proj",
    "correlator joined": "factor_input_proj",
    "factor correlator": "out_head in_head anchor_out_head",
}
"""Parts of the head that have a weight and a bias, by the axes of the weight; `N` is the number of a layer."""
HEAD_VECTORS = {
    "one one draft one correlator": "slot_embedding",
    "one one one candidate correlator": "rank_embedding",
    "heads distance": "relative_slot_bias",
    "heads": "same_slot_bias",
    "correlator": "output_norm.weight anchor_norm.weight layers.N.attn_norm.weight layers.N.mlp_norm.weight",
    "joined correlator": "layers.N.attn.in_proj_weight",
    "joined": "layers.N.attn.in_proj_bias",
}
"""Its other tensors, by their axes."""
OLDER_NAMES = {
    "feature_mlp.0": "feature_norm",
    "feature_mlp.1": "feature_mlp.up_proj",
    "feature_mlp.3": "feature_mlp.down_proj",
    "mlp.0": "mlp.up_proj",
    "mlp.2": "mlp.down_proj",
}
"""Names of parts of the head in older checkpoints, and the newer ones, without which vLLM 0.32 refuses a head."""


Positive = Annotated[int, Strict(), Field(ge=1, le=2**20)]
Scale = Annotated[float, Strict(), Field(gt=0, lt=1e30)]


@dataclass(frozen=True)
class HeadSpec:
    """Sizes and constants of a LiLiCorr head; published config keys are these names after `lilicorr_`."""

    candidate_topk: Annotated[int, Strict(), Field(ge=1, le=1024)]
    """Best tokens of each slot that it chooses from."""
    hidden_size: Annotated[int, Strict(), Field(ge=0, le=2**20)]
    """Its width; 0 for the drafter's."""
    num_heads: Positive
    factor_dim: Positive
    """Length of the vectors whose products are the scores."""
    num_layers: Annotated[int, Strict(), Field(ge=1, le=100)]
    mlp_ratio: Scale
    vector_eps: Scale
    logit_scale: Scale


def head_for(hidden_size: int, num_candidates: int, width: int | None = None) -> HeadSpec:
    """Choose the sizes of a head.

    Published ones are a quarter as wide as the drafter (1024 at 4096). There the head is 3 % of a step. Next to a small
    target on a CPU it would be more than 10 %, so below 1024 a sixth is taken, 96 at 576, which is about 5 %.

    Args:
        hidden_size: of the drafter.
        num_candidates: of each slot.
        width: of the head; by default as above.
    """
    narrow = max(8, hidden_size // 48 * 8)
    width = width or (hidden_size // 4 if hidden_size >= 1024 else narrow)
    num_heads = next(count for count in (8, 4, 2, 1) if width % count == 0 and width >= 24 * count or count == 1)
    return HeadSpec(
        candidate_topk=num_candidates,
        hidden_size=0 if width == hidden_size else width,
        num_heads=num_heads,
        factor_dim=width,
        num_layers=2,
        mlp_ratio=2.0,
        vector_eps=1e-4,
        logit_scale=8.0,
    )


def numbered(tensors: Tensors, num_layers: int) -> dict[str, tuple[str, str]]:
    """Name the tensors of each layer, whose number is `N` in a table."""
    return {
        name.replace("N", str(layer)): (axes, gguf.replace("N", str(layer)))
        for layer in range(max(1, num_layers))
        for name, (axes, gguf) in tensors.items()
    }


def tensors_of(
    num_layers: int, *, has_taps: bool, num_head_layers: int, has_projection: bool
) -> dict[str, tuple[str, str]]:
    """Return axes and llama.cpp's name of every tensor of a drafter but `TABLES`, by its published name.

    Nothing is permuted for llama.cpp, because the drafter's rotary embedding is NeoX's. Its names of the head are not
    known.

    Args:
        num_layers: of the drafter.
        has_taps: whether it has DFlash2's convolutions; without a head they come with a selector.
        num_head_layers: layers of its LiLiCorr head; 0 without one.
        has_projection: whether the head is narrower than the drafter, and so has `token_proj`.

    Source: DFlash (arXiv 2602.06036); DFlash2, z-lab/dflash; LiLiCorr (arXiv 2608.20530), as in NVIDIA's
    Model-Optimizer.
    """
    selector = SELECTOR_TENSORS if has_taps and not num_head_layers else {}
    convolutions = CONVOLUTION_TENSORS if has_taps else {}
    known = numbered({**TENSORS, **selector, **LAYER_TENSORS, **convolutions}, num_layers)
    if not num_head_layers:
        return known
    head = {name: axes for axes, names in HEAD_VECTORS.items() for name in names.split()}
    for axes, names in HEAD_LINEARS.items():
        for name in names.split():
            head |= {f"{name}.weight": axes, f"{name}.bias": axes.split()[0]}
    head = {LILICORR + name: (axes, "") for name, axes in head.items() if has_projection or "token_proj" not in name}
    return known | numbered(head, num_head_layers)


def count_head_layers(names: Iterable[str]) -> int:
    """Count the layers of the head that have a tensor among these published names; 0 without a head."""
    return len({name.split(".")[2] for name in names if name.startswith(f"{LILICORR}layers.")})


def published_name(name: str) -> str:
    """Return the newer name of a tensor of the head, which this project writes; other names stay as they are."""
    if not name.startswith(LILICORR):
        return name
    for older, newer in OLDER_NAMES.items():
        name = name.replace(f".{older}.", f".{newer}.")
    return name
