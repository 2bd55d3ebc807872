"""Decoder layers, and whole decoders, in half as many operations.

`fuse_layers` takes the layers of a model and lets them compute with combined products; `run_layers` runs all layers of
a decoder in one loop. Results have the same bits on a CPU; on a GPU, they are equal up to rounding. In a small model,
and in any model on a GPU, a large part of a step's time is spent outside the matrix products; this part becomes faster.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpace.fast.attention import EXACT, MAX_QUERIES, NAME, attend_in_groups, make_causal_mask
from dpace.fast.cache import is_full_attention
from dpace.fast.eight_bits import EightBitLinear, join_eight_bits
from dpace.fast.packing import FastForm, FastModule, PackedLinear, is_plain, join, unpack
from dpace.modeling_dflash import DFlashLayer, Mask, Rope

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Layer classes of transformers with the computation of `FusedLayer`; `fuse_layers` also tests the first layer."""
RECORDERS = (__name__, "transformers.utils.output_capturing")
"""Files whose hooks stay on layers, and record outputs in passes of the decoder's own code only."""
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Decoder classes of transformers with the computation of `run_layers`."""


def fuse_layers(model: PreTrainedModel) -> bool:
    """Fuse the decoder layers of a model in eval mode, in place; return whether it was done.

    Query, key and value become one product, so do gate and up, and norms and rotations take fewer operations. The
    layers must be one of `LAYERS`, or `DFlashLayer`. Their linear layers must be packed on a CPU
    (`dpace.fast.packing`), and plain elsewhere. The first of `LAYERS` must be about as near to the result in fp64 as it
    was before, at most twice as far. Hooks on layers run as before; hooks on modules inside them do not.

    Memory: on a CPU one packed copy of the weights, in place of the packed copies of the single linear layers;
    elsewhere none. While the first layer is tried out, copies of it, of which one is in fp64 on the CPU.
    """
    layers: list[Any] = []
    for module in model.modules():
        if type(module).__name__ in LAYERS or type(module) is DFlashLayer:
            layers.append(module)
    if not layers or not all(map(_can_be_fused, layers)) or not _is_exact_enough(layers[0]):
        return False
    for layer in layers:
        _fuse(layer)
    return True


def _linears(layer: Any) -> list[Any]:
    """Return the linear layers: for query, key, value, output, gate, up and down."""
    attention = layer.self_attn
    mlp = layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _can_be_fused(layer: Any) -> bool:
    """Return whether the linear layers are packed, or plain on a device where nothing is packed."""
    for linear in _linears(layer):
        is_unpacked = type(linear) is nn.Linear and is_plain(linear.weight) and linear.weight.device.type != "cpu"
        if type(linear) not in (PackedLinear, EightBitLinear) and not is_unpacked:
            return False
    return True


def _fuse(layer: Any) -> None:
    """Let a layer compute with `FusedProducts`."""
    kind = type(layer)
    layer.fast = FusedProducts(layer)
    # The class is exchanged, and not the module, so that names of parameters and references to it stay.
    layer.__class__ = FusedDraftLayer if kind is DFlashLayer else _fused_class(kind)
    if not layer.fast.is_eight_bits:
        unpack(_linears(layer))


@functools.cache
def _fused_class(kind: type) -> type:
    """Make the class that computes with fused products for one of `LAYERS`, the same one for all of its layers."""
    return type(f"Fused{kind.__name__}", (FusedLayer, kind), {})


def _is_exact_enough(layer: Any) -> bool:
    """Return whether one of `LAYERS`, fused, is at most twice as far from the result in fp64 as it is now."""
    if type(layer) is DFlashLayer:
        return True
    exact = _try_out(copy.deepcopy(layer).to("cpu", torch.float64))
    before = _try_out(layer)
    fused = copy.deepcopy(layer)
    _fuse(fused)
    bound = 2 * (before - exact).norm() + 1e-6 * exact.norm()
    return bool((_try_out(fused) - exact).norm() <= bound)  # NaN is no result


@torch.no_grad()
def _try_out(layer: Any) -> Tensor:
    """Compute the output of one of `LAYERS` for random rows and a rotation, all exact in bf16."""
    weight = layer.input_layernorm.weight
    random = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 3, layer.self_attn.head_dim // 2, generator=random).repeat(1, 1, 2)
    inputs = torch.randn(1, 3, len(weight), generator=random), angles.cos(), angles.sin()
    rows, cos, sin = (values.bfloat16().to(weight) for values in inputs)
    return layer(rows, position_embeddings=(cos, sin)).to("cpu", torch.float64)


class Rotation:
    """The rotary embedding of a forward pass, from its cosines and sines."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.half = sin.shape[-1] // 2
        # (batch, 1, seq, dim). transformers negates half of each head; negating the sines instead, a roll is enough.
        first, second = sin.unsqueeze(1).chunk(2, -1)
        self.sin = torch.cat([-first, second], dim=-1)
        self.cos = cos.unsqueeze(1)

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate "batch head seq dim" as `apply_rotary_pos_emb` of transformers does, into a new tensor."""
        return heads.roll(self.half, -1).mul_(self.sin).add_(heads * self.cos)


class FusedProducts(FastForm):
    """The fast form of a decoder layer: its combined products and what is needed around them."""

    def __init__(self, layer: Any):
        query, key, value, out, gate, up, down = _linears(layer)
        self.is_eight_bits = isinstance(query, EightBitLinear)
        combine = join_eight_bits if self.is_eight_bits else join
        # Linear layers that read the same rows become one product.
        self.qkv = combine([query, key, value])
        self.out = combine([out])
        self.gate_up = combine([gate, up])
        self.down = combine([down])
        super().__init__(layer)  # only now, because joining may move weights to other addresses
        attention = layer.self_attn
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        if "q_norm" in attention._modules:
            self.norms += [attention.q_norm.weight, attention.k_norm.weight]
        self.dtype = self.norms[0].dtype
        self.attention_dtype = torch.float64 if self.is_eight_bits else self.dtype  # see `exact_attention`
        self.epsilon = layer.input_layernorm.variance_epsilon
        # As tensors too, because `torch.addcdiv` takes no numbers.
        self.epsilon_tensor = torch.tensor(self.epsilon)
        self.width_tensor = torch.tensor(float(len(self.norms[0])))
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        # Numbers of query heads and of key heads.
        self.sizes = [query.out_features // self.head_dim, key.out_features // self.head_dim]
        self.activation = layer.mlp.act_fn.forward

    def step(self, hidden: Tensor, rotation: Rotation, mask: Tensor | None, cache: Any) -> Tensor:
        """Compute the layer's output, with its own layer of the cache."""
        query, key, value = self.heads(self.norm(hidden, 0), rotation)
        key, value = cache.update(key, value)
        return self.finish(hidden, attend_in_groups(query, key, value, mask, self.scaling))

    def heads(self, rows: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Compute rotated queries, rotated keys and values from the normalized input, each "batch head seq dim".

        Queries and keys have norms of their own in some families.
        """
        # (batch, seq, head, dim), with the heads of queries, then of keys, then of values
        heads = self.qkv(rows).view(*rows.shape[:2], -1, self.head_dim)
        num_queries, num_keys = self.sizes
        to_rotate, value = heads.split((num_queries + num_keys, num_keys), 2)
        if len(self.norms) > 2:
            # Normalized together, and then each part times its own weight, in place.
            to_rotate = torch.rms_norm(to_rotate, to_rotate.shape[-1:], None, self.epsilon)
            for normalized, weight in zip(to_rotate.split(self.sizes, 2), self.norms[2:], strict=True):
                normalized.mul_(weight)
        query, key = rotation.rotate(to_rotate.transpose(1, 2)).to(self.attention_dtype).split(self.sizes, 1)
        return query, key, value.transpose(1, 2).to(self.attention_dtype)

    def norm(self, rows: Tensor, index: int) -> Tensor:
        """Apply one of the layer's RMSNorms; on a CPU it rounds twice in low precision, like transformers'."""
        weight = self.norms[index]
        if rows.device.type != "cpu":
            return torch.rms_norm(rows, weight.shape, weight, self.epsilon)
        if rows.dtype == torch.float32:
            # 1 / sqrt(epsilon + sum of squares / width): half as many operations as torch's, and the same bits
            squares = (rows * rows).sum(-1, keepdim=True)
            inverse_rms = torch.addcdiv(self.epsilon_tensor, squares, self.width_tensor).rsqrt_()
            return (rows * inverse_rms).mul_(weight)
        return weight * torch.rms_norm(rows, weight.shape, None, self.epsilon)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add attention and feed-forward to `hidden`."""
        hidden = hidden + self.out(attended.flatten(2).to(self.dtype))
        return hidden + self.feed_forward(self.norm(hidden, 1))

    def feed_forward(self, rows: Tensor) -> Tensor:
        """Compute the feed-forward part of normalized rows."""
        gate, up = self.gate_up(rows).chunk(2, -1)
        return self.down(self.activation(gate) * up)


class FusedLayer(FastModule):
    """A mixin for one of `LAYERS`, whose own code still runs where the fused products cannot be used."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        *args: Any,
        cache: Cache | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the layer's output, equal to what its own class computes."""
        fused = self.fast
        attention: Any = self._modules["self_attn"]  # nn.Module's own attribute lookup is slow
        attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
        if not (fused and attend and self.is_usable(hidden_states, fused.dtype)):
            kwargs |= {"cache": cache, "position_embeddings": position_embeddings}
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = fused.heads(fused.norm(hidden_states, 0), Rotation(*position_embeddings))
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx, kwargs=kwargs)
        attended, _ = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs)
        return fused.finish(hidden_states, attended)


class FusedDraftLayer(FastModule, DFlashLayer):
    """A drafter's layer with fused products."""

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        rope: Rope,
        mask: Mask,
        cache: Cache | None,
        block_size: int | None = None,
    ) -> Tensor:
        """Compute the output of a `DFlashLayer`, whose own code also runs for the masks of training."""
        fused = self.fast
        is_dense = mask is None or isinstance(mask, Tensor)
        if fused is None or not is_dense or not self.is_usable(hidden, fused.dtype):
            return super().forward(hidden, context, rope, mask, cache, block_size)
        attention: Any = self.self_attn
        rotation = Rotation(*rope)

        def attend(rows: Tensor) -> Tensor:
            # One product for the context and the slots; the queries of the context are not used.
            query, key, value = fused.heads(torch.cat([context, rows], dim=1), rotation)
            if cache is not None:
                key, value = cache.update(key, value, attention.layer_idx)
            slot_queries = query[:, :, context.shape[1] :]
            visible = attention.limit(mask, rows.shape[1], key)
            return fused.out(attend_in_groups(slot_queries, key, value, visible).flatten(2))

        norms = [functools.partial(fused.norm, index=0), functools.partial(fused.norm, index=1)]
        return self.add_parts(hidden, norms, attend, fused.feed_forward, block_size)


def run_layers(
    decoder: Any,
    token_ids: Tensor,
    cache: Any,
    layer_ids: Sequence[int],
    *,
    mask: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Tensor, list[Tensor]] | None:
    """Run all layers of a decoder in one loop for a decoding step.

    Results equal what the decoder's own code gives: bitwise on a CPU, and up to rounding elsewhere.

    Args:
        decoder: of a target.
        token_ids: "batch new".
        cache: receives keys and values; used here only with full attention in all layers.
        layer_ids: the layers whose outputs are returned.
        mask: "batch 1 new key", added to the scores; with None each token sees those before it and itself.
        position_ids: "batch new"; None for the positions after the tokens in the cache.

    Returns:
        The LM head's input and the outputs of the layers, each "batch new hidden". None where the decoder's own code
        has to run: it is none of `DECODERS`, its layers are not fused, others have put hooks, or the tokens are a
        prompt.
    """
    num_new = token_ids.shape[1]
    is_known = type(decoder).__name__ in DECODERS and decoder.config._attn_implementation in (NAME, EXACT)
    if not is_known or cache is None or num_new > MAX_QUERIES:
        return None
    layers: list[Any] = list(decoder.layers)
    if not is_full_attention(cache) or _has_hooks(decoder):
        return None
    if not all(isinstance(layer, FusedLayer) and layer.fast and not _has_hooks(layer) for layer in layers):
        return None
    embedding = decoder.embed_tokens.weight
    # One layer answers for all: they were fused together and have one dtype.
    if not layers[0].is_usable(embedding, layers[0].fast.dtype):
        return None
    hidden = nn.functional.embedding(token_ids, embedding)
    num_before = cache.layers[0].get_seq_length()
    if position_ids is None:
        position_ids = torch.arange(num_before, num_before + num_new, device=hidden.device)[None]
    if mask is None and num_new > 1:
        mask = make_causal_mask(hidden, num_before + num_new)
    rotation = Rotation(*decoder.rotary_emb(hidden, position_ids))
    outputs = {}
    for layer_id, (layer, layer_cache) in enumerate(zip(layers, cache.layers, strict=True)):
        hidden = layer.fast.step(hidden, rotation, mask, layer_cache)
        if layer_id in layer_ids:
            outputs[layer_id] = hidden
    return decoder.norm(hidden), [outputs[layer_id] for layer_id in layer_ids]


class _StopForward(Exception):
    """Raised to end a forward pass that runs for the outputs of its first layers only."""


class LayerOutputs:
    """A recorder of the outputs of decoder layers while the model runs its own code.

    A layer gets its hook when its output is first asked for, and keeps it: `torch.compile` traces a hook, but not its
    coming and going. Threads take turns, since all of them call the same hooks; compiled steps have no lock.
    """

    turn = threading.RLock()  # of all targets, since a copy of a model copies its hooks, and no lock can be copied

    def __init__(self):
        self.outputs: dict[int, Tensor] | None = None
        self.last_layer: int | None = None
        self.hooked: set[int] = set()

    @contextmanager
    def record(
        self, layers: nn.ModuleList, layer_ids: Sequence[int], *, is_last: bool = False
    ) -> Iterator[dict[int, Tensor]]:
        """Yield the outputs of layers by id, which a pass inside the `with` block fills in.

        With `is_last` the pass and the block end after the highest of these layers.
        """
        with nullcontext() if torch.compiler.is_compiling() else self.turn:  # no compiler traces a lock
            for layer_id in layer_ids:
                if layer_id not in self.hooked:
                    self.hooked.add(layer_id)
                    layers[layer_id].register_forward_hook(self._make_hook(layer_id))
            outputs = self.outputs = {}
            self.last_layer = max(layer_ids) if is_last else None
            try:
                yield outputs
            except _StopForward:
                pass
            finally:
                self.outputs = None

    def _make_hook(self, layer_id: int) -> Callable[..., None]:
        """Make the hook of a layer, which does nothing outside of `record`."""

        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Any, ...]) -> None:
            if self.outputs is not None:
                self.outputs[layer_id] = output[0] if isinstance(output, tuple) else output
                if layer_id == self.last_layer:
                    raise _StopForward

        return hook


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that are not `RECORDERS`."""
    if module._forward_pre_hooks:
        return True
    return any(hook.__module__ not in RECORDERS for hook in module._forward_hooks.values())
