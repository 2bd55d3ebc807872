"""Decoder layers, and whole decoders, in half as many operations.

`fuse_layers` takes the layers of a model and lets them compute with combined products; `run_layers` runs all layers of
a decoder in one loop. Results have the same bits on a CPU, except for rows that share a long beginning; there, and on a
GPU, they are equal up to rounding. In a small model, and in any model on a GPU, a large part of a step's time is spent
outside the matrix products; this part becomes faster.
"""

import copy
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpace.fast.attention import MAX_QUERIES, NAME, attend_in_groups, make_causal_mask
from dpace.fast.cache import RaggedLayer, is_full_attention
from dpace.fast.packing import FastForm, FastModule, PackedLinear, is_plain, join, pack
from dpace.modeling_dflash import DFlashLayer

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
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Decoder classes of transformers with the computation of `run_layers`."""


def fuse_layers(model: PreTrainedModel) -> bool:
    """Fuse the decoder layers of a model in eval mode, in place; return whether it was done.

    Query, key and value become one product, so do gate and up, and norms and rotations take fewer operations. The
    layers must be one of `LAYERS`, or `DFlashLayer`. Their linear layers must be packed on a CPU
    (`dpace.fast.packing`), and plain elsewhere. The first of `LAYERS` must be about as near to the result in fp64 as it
    was before, at most twice as far. Hooks on layers run as before; hooks on modules inside them do not.

    Memory: on a CPU one packed copy of the weights, in place of the packed copies of the single linear layers;
    elsewhere none. While the first layer is tried out, a copy of it, and one in fp64 on the CPU.
    """
    layers: list[Any] = [
        layer for layer in model.modules() if type(layer).__name__ in LAYERS or type(layer) is DFlashLayer
    ]
    if not all(_can_be_fused(getattr(getattr(layer, owner), name)) for layer in layers for owner, name in LINEARS):
        return False
    for number, layer in enumerate(layers):
        is_tested = number == 0 and type(layer).__name__ in LAYERS
        before = [_try_out(copy.deepcopy(layer).to("cpu", torch.float64)), _try_out(layer)] if is_tested else []
        layer.fast = FusedProducts(layer)
        layer.__class__ = _fused_class(type(layer))
        if before:
            exact, theirs = before
            bound = 2 * (theirs - exact).norm() + 1e-6 * exact.norm()
            if not (_try_out(layer) - exact).norm() <= bound:  # NaN is no result
                layer.fast = None
                return False
        for linear in sum(layer.fast.linears, []):
            vars(linear).pop("fast", None)  # its own packed copy
            linear.__class__ = nn.Linear
    return bool(layers)


def _can_be_fused(linear: nn.Module) -> bool:
    """Return whether a linear layer is packed, or plain on a device where nothing is packed."""
    is_here = type(linear) is nn.Linear and is_plain(linear.weight) and linear.weight.device.type not in ("cpu", "meta")
    return is_here or type(linear) is PackedLinear


class _Rotation:
    """The rotary embedding of one forward pass, shared by all its layers.

    The first layer makes it. It is kept as an attribute of the sines, which are the same tensor for all layers of a
    pass.
    """

    def __init__(self, cos: Tensor, sin: Tensor):
        self.half = sin.shape[-1] // 2
        signed = torch.cat([-sin[..., : self.half], sin[..., self.half :]], dim=-1)
        self.cos_and_sin = cos.unsqueeze(1), signed.unsqueeze(1)

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate "batch head seq dim" as `apply_rotary_pos_emb` of transformers does, into a new tensor."""
        cos, sin = self.cos_and_sin
        return heads.roll(self.half, -1).mul_(sin).add_(heads * cos)


def _rotation(rope: tuple[Tensor, Tensor]) -> _Rotation:
    """Return the rotation with these cosines and sines, which another layer may have made."""
    if torch.compiler.is_compiling():  # which sees that all layers make the same
        return _Rotation(*rope)
    sin: Any = rope[1]
    if "rotation" not in vars(sin):
        sin.rotation = _Rotation(*rope)
    return sin.rotation


class _Heads(NamedTuple):
    """Queries, keys and values of an attention layer, each "batch head seq dim"."""

    query: Tensor
    key: Tensor
    value: Tensor


class FusedProducts(FastForm):
    """The fast form of a decoder layer: its combined products and what is needed around them."""

    def __init__(self, layer: Any):
        attention = layer.self_attn
        self.linears = [[getattr(getattr(layer, owner), name) for name in names] for owner, names in PRODUCTS]
        combine = _pack_together if type(self.linears[0][0]) is PackedLinear else join
        self.qkv = combine(self.linears[0])
        self.out = combine(self.linears[1])
        self.gate_up = combine(self.linears[2])
        self.down = combine(self.linears[3])
        super().__init__(layer)  # after the weights were joined
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [attention._modules[name] for name in ("q_norm", "k_norm") if name in attention._modules]
        self.norms = [norm.weight for norm in norms]
        self.dtype = self.norms[0].dtype
        self.epsilon = layer.input_layernorm.variance_epsilon
        self.epsilons = torch.tensor(self.epsilon)
        self.widths = torch.tensor(float(len(self.norms[0])))
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        num_queries, num_keys = (linear.out_features // self.head_dim for linear in self.linears[0][:2])
        self.sizes = num_queries, num_keys
        activation = layer.mlp.act_fn
        self.activation = nn.functional.silu if type(activation) in (SiLUActivation, nn.SiLU) else activation

    def step(self, hidden: Tensor, rotation: _Rotation, mask: Tensor | None, cache: Any) -> Tensor:
        """Compute the layer's output, with its own part of the cache."""
        heads = self.heads(self.norm(hidden, 0), rotation)
        key, value = cache.update(heads.key, heads.value)
        is_whole = isinstance(cache, RaggedLayer) and not cache.is_part and not torch.compiler.is_compiling()
        shared = cache.num_shared if is_whole else 0
        return self.finish(hidden, attend_in_groups(heads.query, key, value, mask, self.scaling, num_shared=shared))

    def heads(self, rows: Tensor, rotation: _Rotation) -> _Heads:
        """Compute rotated queries, rotated keys and values from the normalized input.

        Queries and keys have norms of their own in some families.
        """
        num_queries, num_keys = self.sizes
        heads = self.qkv(rows).view(*rows.shape[:2], -1, self.head_dim)
        to_rotate, value = heads.split((num_queries + num_keys, num_keys), 2)
        if len(self.norms) > 2:
            to_rotate = torch.rms_norm(to_rotate, to_rotate.shape[-1:], None, self.epsilon)
            for part, weight in zip(to_rotate.split(self.sizes, 2), self.norms[2:], strict=True):
                part.mul_(weight)
        query, key = rotation.rotate(to_rotate.transpose(1, 2)).split(self.sizes, 1)
        return _Heads(query, key, value.transpose(1, 2))

    def norm(self, rows: Tensor, index: int) -> Tensor:
        """Apply one of the layer's RMSNorms; on a CPU it rounds twice in low precision, like transformers'."""
        weight = self.norms[index]
        if rows.device.type != "cpu":
            return torch.rms_norm(rows, weight.shape, weight, self.epsilon)
        if rows.dtype == torch.float32:  # torch's own takes twice as many operations, with the same bits
            means = torch.addcdiv(self.epsilons, (rows * rows).sum(-1, keepdim=True), self.widths)
            return (rows * means.rsqrt_()).mul_(weight)
        return weight * torch.rms_norm(rows, weight.shape, None, self.epsilon)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add attention and feed-forward to `hidden`."""
        hidden = hidden + self.out(attended.flatten(2))
        return hidden + self.feed_forward(self.norm(hidden, 1))

    def feed_forward(self, rows: Tensor) -> Tensor:
        """Compute the feed-forward part of normalized rows."""
        gate, up = self.gate_up(rows).chunk(2, -1)
        return self.down(self.activation(gate) * up)


def _pack_together(linears: list[nn.Linear]) -> Any:
    """Make one product that gives the outputs of the linear layers side by side."""
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return pack(torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None)


class FusedLayer(FastModule):
    """A mixin for one of `LAYERS`, whose own code still runs where the fused products cannot be used."""

    def forward(self, hidden_states, attention_mask=None, *args, cache=None, position_embeddings=None, **kwargs):
        """Compute the layer's output, equal to that of its own class."""
        fused = self.fast
        attention: Any = self._modules["self_attn"]  # nn.Module's own attribute lookup is slow
        if fused is not None and position_embeddings is not None and self.is_usable(hidden_states, fused.dtype):
            attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
            if attend is not None:
                heads = fused.heads(fused.norm(hidden_states, 0), _rotation(position_embeddings))
                if cache is not None:
                    heads = _Heads(heads.query, *cache.update(*heads[1:], attention.layer_idx, kwargs=kwargs))
                scaling = attention.scaling
                attended, _ = attend(attention, *heads, attention_mask, scaling=scaling, **kwargs)
                return fused.finish(hidden_states, attended)
        kwargs |= {"cache": cache, "position_embeddings": position_embeddings}
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


class FusedDraftLayer(FastModule, DFlashLayer):
    """A drafter's layer with fused products."""

    def forward(self, hidden, context, rope, mask, cache, block_size=None):
        """Compute the output of a `DFlashLayer`, whose own code also runs for the masks of training."""
        fused = self.fast
        is_dense = mask is None or isinstance(mask, Tensor)
        if fused is None or not is_dense or not self.is_usable(hidden, fused.dtype):
            return super().forward(hidden, context, rope, mask, cache, block_size)
        attention: Any = self.self_attn
        rotation = _rotation(rope)

        def attend(rows):
            heads = fused.heads(torch.cat([context, rows], dim=1), rotation)
            if cache is not None:
                heads = _Heads(heads.query, *cache.update(heads.key, heads.value, attention.layer_idx))
            query = heads.query[:, :, context.shape[1] :]
            seen = attention.limit(mask, rows.shape[1], heads.key)
            if rows.shape[1] <= MAX_QUERIES:
                attended = attend_in_groups(query, heads.key, heads.value, seen)
            else:
                sdpa = nn.functional.scaled_dot_product_attention
                attended = sdpa(query, heads.key, heads.value, attn_mask=seen, enable_gqa=True).transpose(1, 2)
            return fused.out(attended.flatten(2))

        norms = [functools.partial(fused.norm, index=index) for index in (0, 1)]
        return self.add_parts(hidden, norms, attend, fused.feed_forward, block_size)


@functools.cache
def _fused_class(kind: type) -> type:
    return FusedDraftLayer if kind is DFlashLayer else type(f"Fused{kind.__name__}", (FusedLayer, kind), {})


@torch.no_grad()
def _try_out(layer: Any) -> Tensor:
    """Compute the output of one of `LAYERS` for random rows and a rotation, all exact in bf16."""
    weight = layer.input_layernorm.weight
    random = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 3, layer.self_attn.head_dim // 2, generator=random).repeat(1, 1, 2)
    inputs = torch.randn(1, 3, len(weight), generator=random), angles.cos(), angles.sin()
    rows, *rope = (x.bfloat16().to(weight) for x in inputs)
    return layer(rows, position_embeddings=tuple(rope)).to("cpu", torch.float64)


def run_layers(
    decoder: Any,
    token_ids: Tensor,
    cache: Any,
    layer_ids: Sequence[int] = (),
    *,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]] | None:
    """Run all layers of a decoder in one loop for a decoding step.

    Results are those of the decoder's own code: bitwise on a CPU for one text, and for rows that share fewer than 64
    columns of the cache; up to rounding for rows that share more, and elsewhere.

    Args:
        decoder: of a target.
        token_ids: "batch new".
        cache: receives keys and values; used here only with full attention in all layers.
        layer_ids: the layers whose outputs are returned.
        mask: "batch 1 new key", added to the scores; by default each token sees those before it and itself.
        position_ids: "batch new"; by default those behind the tokens in the cache.

    Returns:
        The LM head's input and the outputs of the layers, each "batch new hidden". None where the decoder's own code
        has to run: it is none of `DECODERS`, its layers are not fused, others have put hooks, or the tokens are a
        prompt.
    """
    num_new = token_ids.shape[1]
    is_known = type(decoder).__name__ in DECODERS and decoder.config._attn_implementation == NAME
    if not is_known or cache is None or num_new > MAX_QUERIES:
        return None
    layers: list[Any] = list(decoder.layers)
    embedding = decoder.embed_tokens.weight
    is_usable = isinstance(layers[0], FusedLayer) and layers[0].is_usable(embedding, embedding.dtype)
    if not is_usable or len(cache.layers) != len(layers) or not is_full_attention(cache):
        return None
    if _has_hooks(decoder) or not all(layer.fast and not _has_hooks(layer) for layer in layers):
        return None
    hidden = nn.functional.embedding(token_ids, embedding)
    num_before = cache.layers[0].get_seq_length()
    if position_ids is None:
        position_ids = torch.arange(num_before, num_before + num_new, device=hidden.device)[None]
    if mask is None and num_new > 1:
        mask = make_causal_mask(hidden, num_before + num_new)
    rotation = _Rotation(*decoder.rotary_emb(hidden, position_ids))
    outputs = {}
    for number, (layer, layer_cache) in enumerate(zip(layers, cache.layers, strict=True)):
        hidden = layer.fast.step(hidden, rotation, mask, layer_cache)
        if number in layer_ids:
            outputs[number] = hidden
    return decoder.norm(hidden), [outputs[number] for number in layer_ids]


class LayerOutputs:
    """A recorder of the outputs of decoder layers while the model runs its own code.

    A layer gets its hook when its output is first asked for, and keeps it: `torch.compile` traces a hook, but not its
    coming and going. Threads take turns, since all of them call the same hooks; compiled steps have no lock.
    """

    turn = threading.RLock()  # of all targets, since a copy of a model copies its hooks, and no lock can be copied

    def __init__(self):
        self.found: dict[int, Tensor] | None = None
        self.hooked: set[int] = set()

    @contextmanager
    def record(self, layers: nn.ModuleList, layer_ids: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Yield the outputs of layers by id; those of a pass inside the `with` block."""
        with nullcontext() if torch.compiler.is_compiling() else self.turn:
            for layer_id in layer_ids:
                if layer_id not in self.hooked:
                    self.hooked.add(layer_id)
                    layers[layer_id].register_forward_hook(self._make_hook(layer_id))
            self.found = {}
            try:
                yield self.found
            finally:
                self.found = None

    def _make_hook(self, layer_id: int) -> Any:
        def hook(_module, _args, output):
            if self.found is not None:
                self.found[layer_id] = output[0] if isinstance(output, tuple) else output

        hook.is_recorder = True  # pyright: ignore[reportFunctionMemberAccess]
        return hook


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that are not those of `LayerOutputs`."""
    hooks = module._forward_hooks.values()
    return bool(module._forward_pre_hooks) or any(not hasattr(hook, "is_recorder") for hook in hooks)
