"""The kinds of drafters: what each adds to DFlash's network, in one place.

A kind knows its tensors and config keys under the names of each engine, which formats cannot hold it, and how hidden
states become a proposal. `KINDS` has them by name, and `kind_of` finds that of a config.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from dpace.drafter.vocabulary import DraftHead
from dpace.modeling_dflash import has_convolutions

Tensors = Mapping[str, tuple[str, str]]
"""Published name of each tensor, its axes, and llama.cpp's name."""

TENSORS: Tensors = {
    "fc.weight": ("hidden feature", "fc.weight"),
    "hidden_norm.weight": ("hidden", "enc.output_norm.weight"),
    "norm.weight": ("hidden", "output_norm.weight"),
}
LAYER_TENSORS: Tensors = {
    "input_layernorm.weight": ("hidden", "attn_norm.weight"),
    "self_attn.q_proj.weight": ("query hidden", "attn_q.weight"),
    "self_attn.k_proj.weight": ("key hidden", "attn_k.weight"),
    "self_attn.v_proj.weight": ("key hidden", "attn_v.weight"),
    "self_attn.o_proj.weight": ("hidden query", "attn_output.weight"),
    "self_attn.q_norm.weight": ("head", "attn_q_norm.weight"),
    "self_attn.k_norm.weight": ("head", "attn_k_norm.weight"),
    "post_attention_layernorm.weight": ("hidden", "ffn_norm.weight"),
    "mlp.gate_proj.weight": ("inner hidden", "ffn_gate.weight"),
    "mlp.up_proj.weight": ("inner hidden", "ffn_up.weight"),
    "mlp.down_proj.weight": ("hidden inner", "ffn_down.weight"),
}
"""`query` is heads x head_dim, `key` the same for key heads."""
SELECTOR_TENSORS: Tensors = {
    "candidate_selector.predecessor_codebook": ("vocab rank", "selector_predecessor.weight"),
    "candidate_selector.successor_codebook": ("vocab rank", "selector_successor.weight"),
    "candidate_selector.hidden_projection.weight": ("rank hidden", "selector_hidden.weight"),
}
CONVOLUTION_TENSORS: Tensors = {
    "attention_conv.base_kernel": ("side tap hidden", "attn_conv_base"),
    "attention_conv.kernel_projection.weight": ("kernel hidden", "attn_conv_proj.weight"),
    "mlp_conv.base_kernel": ("side tap hidden", "ffn_conv_base"),
    "mlp_conv.kernel_projection.weight": ("kernel hidden", "ffn_conv_proj.weight"),
}
"""`kernel` is sides x taps x groups of channels."""


class Draft(NamedTuple):
    """What a drafter proposes behind each text."""

    tokens: Int[Tensor, "batch draft"]
    """The best token of each slot."""
    scores: Float[Tensor, "batch draft choice"]
    """Logits of each slot's choices, of which the token is the best."""


@dataclass(frozen=True)
class Kind:
    """A kind of drafter. This one is DFlash's, which adds nothing.

    Source: DFlash (arXiv 2602.06036).
    """

    architecture: str = "DFlashDraftModel"
    """Name of the network's class, by which engines choose their own."""
    other_tensors: Tensors = field(default_factory=lambda: TENSORS)
    layer_tensors: Tensors = field(default_factory=lambda: LAYER_TENSORS)
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Formats that cannot hold such a drafter, with the reason and a way out."""

    def tensors(self, num_layers: int) -> dict[str, tuple[str, str]]:
        """Return axes and llama.cpp's name of every tensor of a drafter, by its published name.

        Nothing is permuted for llama.cpp, because the drafter's rotary embedding is NeoX's.
        """
        tensors = dict(self.other_tensors)
        for layer in range(num_layers):
            for name, (axes, gguf) in self.layer_tensors.items():
                tensors[f"layers.{layer}.{name}"] = axes, f"blk.{layer}.{gguf}"
        return tensors

    def axis_sizes(self, spec: Any) -> dict[str, int]:
        """Return the length of each axis of the tensors of a drafter with this `DrafterSpec`."""
        return {
            "hidden": spec.hidden_size,
            "feature": len(spec.target_layer_ids) * spec.hidden_size,
            "query": spec.num_heads * spec.head_dim,
            "key": spec.num_key_value_heads * spec.head_dim,
            "head": spec.head_dim,
            "inner": spec.intermediate_size,
            "vocab": spec.vocab_size,
            "rank": 1,
            "side": 2,
            "tap": spec.conv_kernel_size,
            "kernel": 2 * spec.conv_kernel_size * (spec.hidden_size // max(1, spec.conv_group_size)),
        }

    def values(self, spec: Any) -> dict[str, int]:
        """Return what the kind adds to `dflash_config`, under the published names."""
        return {}

    def facts(self, spec: Any) -> dict[str, str]:
        """Return rows of the model card about what the kind adds."""
        return {}

    def draft(self, head: DraftHead, hidden: Float[Tensor, "batch slot hidden"], width: int) -> Draft:
        """Make a proposal of `width - 1` tokens from the hidden states of whole blocks."""
        logits = head.logits(hidden[:, 1:width].flatten(0, 1))
        tokens = head.tokens(logits).unflatten(0, (len(hidden), -1))
        return Draft(tokens, logits.unflatten(0, tokens.shape))


class Convolutions(Kind):
    """DFlash2's convolutions, with a selector that changes no choice (`NeutralSelector`).

    Source: DFlash2, z-lab/dflash.
    """

    def values(self, spec: Any) -> dict[str, int]:
        """Return the sizes of convolutions and selector; llama.cpp wants k (k + 1) <= hidden size."""
        top_k = next((k for k in (16, 8, 4) if k * (k + 1) <= spec.hidden_size), 2)
        sizes = {"conv_kernel_size": spec.conv_kernel_size, "conv_group_size": spec.conv_group_size}
        return {**sizes, "selector_rank": 1, "selector_top_k": top_k}

    def facts(self, spec: Any) -> dict[str, str]:
        """Name the taps."""
        text = f"over {spec.conv_kernel_size} slots, as in DFlash2, with a candidate selector of zeros"
        return {"convolutions": text}


KINDS: dict[str, Kind] = {
    "dflash": Kind(),
    "dflash2": Convolutions(
        "DFlash2DraftModel",
        {**TENSORS, **SELECTOR_TENSORS},
        {**LAYER_TENSORS, **CONVOLUTION_TENSORS},
        {
            "speculators": "the drafter has convolutions, and the format of speculators has none; give vLLM or SGLang "
            "the folder that `dpace train` writes"
        },
    ),
}
"""Every kind, by a name of ours."""


def kind_of(config: Any) -> Kind:
    """Return the kind of a drafter by its `config`, as the network reads it."""
    return KINDS["dflash2" if has_convolutions(config) else "dflash"]


def kind_of_tensors(names: Iterable[str]) -> Kind:
    """Return the kind of a drafter by the published names of its tensors."""
    return KINDS["dflash2" if "layers.0.mlp_conv.base_kernel" in names else "dflash"]
