"""Decoder layers in half as many operations: with the same bits on a CPU, and up to rounding on a GPU.

In a small model, and in any model on a GPU, a large part of a step's time is spent outside the matrix products; this
part becomes faster.

All decoder layers of a model in one loop.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpace.fast.attention import MAX_QUERIES, NAME, attend_in_groups
from dpace.fast.cache import PreallocatedLayer, RaggedLayer
from dpace.fast.packing import PackedLinear, Snapshot, is_plain, join, pack, unpack
from dpace.modeling_dflash import DFlashLayer, around

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Layer classes of transformers with the computation of `FusedLayer`; `fuse_layers` also tests the first layer."""
PRODUCTS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Linear layers that read the same rows and so become one product."""
LINEARS = [(owner, name) for owner, names in PRODUCTS for name in names]
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative and absolute differences that count as rounding; `LOW_PRECISION` for other dtypes."""
LOW_PRECISION = 2e-2


class _Rotation:
    """The rotary embedding and the attention function of one forward pass, shared by all its layers.

    The first layer makes it. The others recognize it by its sines, which are the same tensor for all layers of a pass.
    """

    def __init__(self, cos: Tensor, sin: Tensor, config: Any = None):
        self.sin, self.half = sin, sin.shape[-1] // 2
        signed = torch.cat([-sin[..., : self.half], sin[..., self.half :]], dim=-1)
        self.cos_and_sin = cos.unsqueeze(1), signed.unsqueeze(1)
        self.attend = config and ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate "batch head seq dim" as `apply_rotary_pos_emb` of transformers does, into a new tensor."""
        cos, sin = self.cos_and_sin
        return heads.roll(self.half, -1).mul_(sin).add_(heads * cos)


class Source:
    """The modules and weights that products were made of; `is_same` says whether they are unchanged.

    Args:
        modules: the modules, as owner and name; their weights are included.
        parts: further sources to include, in the state that they recorded.
        is_copied: whether the products were made of copies of the weights.
    """

    def __init__(self, modules: list[tuple[Any, str]], parts: Sequence["Source"] = (), *, is_copied: bool = True):
        self.places = [(owner._modules, name) for owner, name in modules]
        for owner, name in modules:
            parameters = owner._modules[name]._parameters
            self.places += [(parameters, kind) for kind in ("weight", "bias") if parameters.get(kind) is not None]
        self.owned = [owner[name] for owner, name in self.places]
        weights = [owned for owned in self.owned if isinstance(owned, nn.Parameter)]
        self.snapshot = Snapshot(weights, [part.snapshot for part in parts], is_copied=is_copied)
        for part in parts:
            self.places.extend(part.places)
            self.owned.extend(part.owned)
        self.owners, self.names = zip(*self.places, strict=True)

    def is_same(self) -> bool:
        """Say whether no weight or module was changed or exchanged."""
        current = map(operator.getitem, self.owners, self.names)
        return self.snapshot.is_same() and all(map(operator.is_, current, self.owned))


class _Fused:
    """The combined products of one layer, valid until its weights or modules change.

    Copies of the layer have none.
    """

    def __init__(self, layer: Any, shared: dict[str, _Rotation]):
        self.shared, attention = shared, layer.self_attn
        linears = [[(getattr(layer, owner), name) for name in names] for owner, names in PRODUCTS]
        norms = [(layer, name) for name in ("input_layernorm", "post_attention_layernorm")]
        norms += [(attention, name) for name in ("q_norm", "k_norm") if name in attention._modules]
        self.linears = [[getattr(*place) for place in places] for places in linears]
        self.is_packed = type(self.linears[0][0]) is PackedLinear
        self.qkv, self.out, self.gate_up, self.down = map(_pack if self.is_packed else join, self.linears)
        modules = [(layer, "self_attn"), (layer, "mlp"), *sum(linears, []), *norms]
        self.source = Source(modules, is_copied=self.is_packed)
        self.norms = [getattr(*place).weight for place in norms]
        self.epsilon, self.head_dim = layer.input_layernorm.variance_epsilon, attention.head_dim
        self.dtype, self.scaling = self.norms[0].dtype, getattr(attention, "scaling", None)
        num_queries, num_keys = (linear.out_features // self.head_dim for linear in self.linears[0][:2])
        self.sizes = num_queries, num_keys
        activation = layer.mlp.act_fn
        self.activation = nn.functional.silu if type(activation) in (SiLUActivation, nn.SiLU) else activation

    def __deepcopy__(self, _memo) -> None:
        return None

    def is_usable(self, hidden: Tensor) -> bool:
        """Say whether the products may be used here.

        They may not under a gradient, inside `torch.compile`, in another dtype, or after weights or modules were
        exchanged.
        """
        return can_be_used(hidden, self.dtype) and self.source.is_same()

    def rotation(self, rope: tuple[Tensor, Tensor], config: Any = None) -> _Rotation:
        """Give the rotation with these cosines and sines, which another layer may have made.

        `config` names the attention function where the layer is the target's.
        """
        last = self.shared.get("last")  # read once: another thread may be decoding
        if last is None or last.sin is not rope[1]:
            last = self.shared["last"] = _Rotation(*rope, config)
        return last

    def step(self, hidden: Tensor, rotation: _Rotation, mask: Tensor | None, cache: Any) -> Tensor:
        """Compute the layer's output, with its own part of the cache."""
        query, key, value = self.heads(self.norm(hidden, 0), rotation)
        key, value = cache.update(key, value)
        return self.finish(hidden, attend_in_groups(query, key, value, mask, self.scaling))

    def heads(self, rows: Tensor, rotation: _Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Compute rotated queries, rotated keys and values, "batch head seq dim", from the normalized input."""
        num_queries, num_keys = self.sizes
        heads = self.qkv(rows).view(*rows.shape[:2], -1, self.head_dim)
        to_rotate, value = heads.split((num_queries + num_keys, num_keys), 2)
        if len(self.norms) > 2:
            to_rotate = self.norm_heads(to_rotate)
        query, key = rotation.rotate(to_rotate.transpose(1, 2)).split(self.sizes, 1)
        return query, key, value.transpose(1, 2)

    def norm(self, rows: Tensor, index: int) -> Tensor:
        """Apply one of the layer's RMSNorms; on a CPU it rounds twice in low precision, like transformers'."""
        weight = self.norms[index]
        if rows.dtype == torch.float32 or rows.device.type != "cpu":
            return torch.rms_norm(rows, weight.shape, weight, self.epsilon)
        return weight * torch.rms_norm(rows, weight.shape, None, self.epsilon)

    def norm_heads(self, heads: Tensor) -> Tensor:
        """Normalize queries and keys, which have norms of their own in some families."""
        heads = torch.rms_norm(heads, heads.shape[-1:], None, self.epsilon)
        for part, weight in zip(heads.split(self.sizes, 2), self.norms[2:], strict=True):
            part.mul_(weight)
        return heads

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add attention and feed-forward to `hidden`."""
        hidden = hidden + self.out(attended.flatten(2))
        return hidden + self.feed_forward(self.norm(hidden, 1))

    def feed_forward(self, rows: Tensor) -> Tensor:
        """Compute the feed-forward part of normalized rows."""
        gate, up = self.gate_up(rows).chunk(2, -1)
        return self.down(self.activation(gate) * up)


def _pack(linears: list[nn.Linear]) -> Any:
    """Make one product that gives the outputs of the linear layers side by side."""
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return pack(torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None)


def can_be_used(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Say whether products in this dtype may be used: no gradient, no `torch.compile`, the same dtype."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and hidden.dtype == dtype


class FusedLayer(nn.Module):
    """A mixin for one of `LAYERS`, whose own code still runs where the fused products cannot be used."""

    fused: _Fused | None

    def __call__(self, *args, **kwargs):
        """Call `forward` directly where the layer has no hooks and is not in training."""
        if self._forward_hooks or self._forward_pre_hooks or self.training:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, hidden_states, attention_mask=None, *args, cache=None, position_embeddings=None, **kwargs):
        """Compute the layer's output, equal to that of its own class."""
        fused, modules = self.fused, self._modules  # nn.Module's own attribute lookup is slow
        attention: Any = modules["self_attn"]
        if fused is not None and position_embeddings is not None and fused.is_usable(hidden_states):
            rotation = fused.rotation(position_embeddings, attention.config)
            if rotation.attend is not None:
                query, key, value = fused.heads(fused.norm(hidden_states, 0), rotation)
                if cache is not None:
                    key, value = cache.update(key, value, attention.layer_idx, kwargs=kwargs)
                scaling = attention.scaling
                attended, _ = rotation.attend(attention, query, key, value, attention_mask, scaling=scaling, **kwargs)
                return fused.finish(hidden_states, attended)
        kwargs |= {"cache": cache, "position_embeddings": position_embeddings}
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


class FusedDraftLayer(DFlashLayer):
    """A drafter's layer with fused products."""

    fused: _Fused | None

    def forward(self, hidden, context, rope, mask, cache, block_size=None):
        """Compute the output of a `DFlashLayer`, whose own code also runs for masks that differ by slot."""
        fused, modules = self.fused, self._modules
        is_shared = mask is None or (isinstance(mask, Tensor) and mask.shape[1:3] == (1, 1))
        if fused is None or not is_shared or not fused.is_usable(hidden):
            return super().forward(hidden, context, rope, mask, cache, block_size)
        attention: Any = modules["self_attn"]
        rotation = fused.rotation(rope)

        def attend(rows):
            query, key, value = fused.heads(torch.cat([context, rows], dim=1), rotation)
            if cache is not None:
                key, value = cache.update(key, value, attention.layer)
            attended = attend_in_groups(query[:, :, context.shape[1] :], key, value, mask)
            return fused.out(attended.flatten(2))

        hidden = hidden + around(self.attention_conv, fused.norm(hidden, 0), attend, block_size)
        return hidden + around(self.mlp_conv, fused.norm(hidden, 1), fused.feed_forward, block_size)


@functools.cache
def _fused_class(kind: type) -> type:
    return FusedDraftLayer if kind is DFlashLayer else type(f"Fused{kind.__name__}", (FusedLayer, kind), {})


def fuse_layers(model: PreTrainedModel) -> bool:
    """Fuse the decoder layers of a model, in place; say whether it was done.

    Query, key and value become one product, so do gate and up, and norms and rotations take fewer operations. The
    layers must be one of `LAYERS`, the first of which must give the same result as before, or `DFlashLayer`. Their
    linear layers must be packed on a CPU (`dpace.fast.packing`), and plain elsewhere. Hooks on layers run as before;
    hooks on modules inside them do not.

    Memory: on a CPU one packed copy of the weights, in place of the packed copies of the single linear layers;
    elsewhere none.
    """
    layers: list[Any] = [
        layer for layer in model.modules() if type(layer).__name__ in LAYERS or type(layer) is DFlashLayer
    ]
    shared: dict[str, _Rotation] = {}
    if not all(_can_be_fused(getattr(getattr(layer, owner), name)) for layer in layers for owner, name in LINEARS):
        return False
    for number, layer in enumerate(layers):
        fused = _Fused(layer, shared)
        expected = _try_out(layer) if number == 0 else None
        layer.fused, layer.__class__ = fused, _fused_class(type(layer))
        layer.snapshot = fused.source.snapshot
        tolerance = ROUNDING.get(fused.dtype, LOW_PRECISION)
        if expected is not None and not torch.allclose(_try_out(layer), expected, tolerance, tolerance):
            layer.fused = None
            return False
        for linear in sum(fused.linears, []) if fused.is_packed else ():
            unpack(linear)
    return bool(layers)


def _can_be_fused(linear: nn.Module) -> bool:
    """Say whether a linear layer is packed, or plain on a device where nothing is packed."""
    is_here = type(linear) is nn.Linear and is_plain(linear.weight) and linear.weight.device.type not in ("cpu", "meta")
    return is_here or type(linear) is PackedLinear


@torch.no_grad()
def _try_out(layer: Any) -> Tensor:
    """Compute a layer's output for random rows and a random rotation."""
    attention, random = layer.self_attn, torch.Generator().manual_seed(0)
    weight = attention.q_proj.weight
    rows = torch.randn(1, 3, weight.shape[1], generator=random).to(weight)
    rope = torch.randn(2, 1, 3, attention.head_dim, generator=random).to(weight)
    if isinstance(layer, DFlashLayer):
        return layer(rows[:, 1:], rows[:, :1], tuple(rope), None, None)
    return layer(rows, position_embeddings=tuple(rope))


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
