"""Decoder layers on a CPU in half as many operations, with the same bits: what a small model's step takes beyond its products."""

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpace.attention import attend_in_groups
from dpace.modeling_dflash import DFlashLayer
from dpace.packing import PackedLinear, pack, unpack

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Classes of transformers that compute what `FusedLayer` does; `fuse_layers` tries that out, too."""
PRODUCTS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Linear layers that read the same rows."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative and absolute differences that are rounding."""

_version = operator.attrgetter("_version")


class _Pass:
    """What all layers of a forward pass share. The first of them makes it; the same sines tell the others that it is theirs."""

    def __init__(self, cos: Tensor, sin: Tensor, config: Any = None):
        self.sin, self.half = sin, sin.shape[-1] // 2
        signed = torch.cat([-sin[..., : self.half], sin[..., self.half :]], dim=-1)
        self.of_heads = cos.unsqueeze(2), signed.unsqueeze(2)
        self.attend = config and ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate "batch seq head dim" as `apply_rotary_pos_emb` of transformers does."""
        cos, sin = self.of_heads
        return heads * cos + heads.roll(self.half, -1) * sin


class _Fused:
    """The products of one layer, to be used while its weights are those that they were made of. Copies of the layer have none."""

    def __init__(self, layer: Any, shared: dict[str, _Pass]):
        self.shared = shared
        self.linears = [[getattr(getattr(layer, owner), name) for name in names] for owner, names in PRODUCTS]
        modules = layer._modules
        places = [(modules[owner]._modules, name) for owner, names in PRODUCTS for name in names]
        places += [
            (linear._parameters, name)
            for linears in self.linears
            for linear in linears
            for name in ("weight", "bias")
            if linear._parameters[name] is not None
        ]
        self.owners, self.names = zip(*places, strict=True)
        self.owned = [owner[name] for owner, name in places]
        self.weights = [owned for owned in self.owned if isinstance(owned, nn.Parameter)]
        self.state = self._state()
        self.packed = [self._pack(linears) for linears in self.linears]
        self.dtype, self.head_dim = self.weights[0].dtype, layer.self_attn.head_dim
        self.num_queries, self.num_keys = (linear.out_features // self.head_dim for linear in self.linears[0][:2])
        activation = layer.mlp.act_fn
        self.activation = nn.functional.silu if type(activation) in (SiLUActivation, nn.SiLU) else activation
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __deepcopy__(self, _memo) -> None:
        return None

    @staticmethod
    def _pack(linears: list[nn.Linear]) -> tuple[Tensor | None, Tensor | None]:
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        return pack(torch.cat([linear.weight for linear in linears])), torch.cat(biases) if biases else None

    def _state(self) -> tuple[list[int], list[int]]:
        """Changes with the values of the weights."""
        return list(map(_version, self.weights)), list(map(Tensor.data_ptr, self.weights))

    def is_usable(self, hidden: Tensor) -> bool:
        """False under a gradient, where it is compiled, in another dtype, and after weights or modules were exchanged."""
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and hidden.dtype == self.dtype
            and self.state == self._state()
            and all(map(operator.is_, map(operator.getitem, self.owners, self.names), self.owned))
        )

    def of_pass(self, rope: tuple[Tensor, Tensor], config: Any = None) -> _Pass:
        """The pass with these cosines and sines, which another layer may have made; `config` names the attention, where it is the target's."""
        last = self.shared.get("pass")  # read once: another thread may be decoding
        if last is None or last.sin is not rope[1]:
            last = self.shared["pass"] = _Pass(*rope, config)
        return last

    def product(self, index: int, rows: Tensor) -> Tensor:
        """What the linear layers of `PRODUCTS[index]` give, side by side."""
        return self.multiply(rows, *self.packed[index], "none", [], "")

    def heads(self, attention: Any, rows: Tensor, of_pass: _Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, "batch head seq dim"."""
        num_queries, num_keys = self.num_queries, self.num_keys
        heads = self.product(0, rows).unflatten(-1, (-1, self.head_dim))
        turned, value = heads.narrow(2, 0, num_queries + num_keys), heads.narrow(2, num_queries + num_keys, num_keys)
        if "q_norm" in attention._modules:
            query, key = turned.narrow(2, 0, num_queries), turned.narrow(2, num_queries, num_keys)
            turned = torch.cat([_norm(attention.q_norm, query), _norm(attention.k_norm, key)], dim=2)
        turned = of_pass.rotate(turned).transpose(1, 2)
        return turned.narrow(1, 0, num_queries), turned.narrow(1, num_queries, num_keys), value.transpose(1, 2)

    def finish(self, modules: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add attention and feed-forward to `hidden`."""
        hidden = hidden + self.product(1, attended.flatten(2))
        gate, up = self.product(2, _norm(modules["post_attention_layernorm"], hidden)).chunk(2, dim=-1)
        return hidden + self.product(3, self.activation(gate) * up)


def _norm(norm: Any, rows: Tensor) -> Tensor:
    """What transformers' RMSNorms give; like them it rounds twice in low precision."""
    weight = norm._parameters["weight"]
    return weight * torch.rms_norm(rows, weight.shape, None, norm.variance_epsilon)


class FusedLayer(nn.Module):
    """Goes before one of `LAYERS`, whose own code runs where the fused products cannot be used."""

    fused: _Fused | None

    def __call__(self, *args, **kwargs):
        """Straight to `forward` where nothing hangs on the layer."""
        if self._forward_hooks or self._forward_pre_hooks or self.training:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, hidden_states, attention_mask=None, *args, cache=None, position_embeddings=None, **kwargs):
        """As the class behind it."""
        fused, modules = self.fused, self._modules  # past nn.Module's own way to them, which is slow
        attention: Any = modules["self_attn"]
        if fused is not None and position_embeddings is not None and fused.is_usable(hidden_states):
            of_pass = fused.of_pass(position_embeddings, attention.config)
            if of_pass.attend is not None:
                rows = _norm(modules["input_layernorm"], hidden_states)
                query, key, value = fused.heads(attention, rows, of_pass)
                if cache is not None:
                    key, value = cache.update(key, value, attention.layer_idx, kwargs=kwargs)
                scaling = attention.scaling
                attended, _ = of_pass.attend(attention, query, key, value, attention_mask, scaling=scaling, **kwargs)
                return fused.finish(modules, hidden_states, attended)
        kwargs |= {"cache": cache, "position_embeddings": position_embeddings}
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


class FusedDraftLayer(DFlashLayer):
    """A drafter's layer."""

    fused: _Fused | None

    def forward(self, hidden, context, rope, mask, cache):
        """As `DFlashLayer`, whose own code also runs for masks that differ by slot."""
        fused, modules = self.fused, self._modules
        is_shared = mask is None or (isinstance(mask, Tensor) and mask.shape[1:3] == (1, 1))
        if fused is None or not is_shared or not fused.is_usable(hidden):
            return super().forward(hidden, context, rope, mask, cache)
        attention: Any = modules["self_attn"]
        of_pass = fused.of_pass(rope)
        rows = torch.cat([context, _norm(modules["input_layernorm"], hidden)], dim=1)
        query, key, value = fused.heads(attention, rows, of_pass)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer)
        return fused.finish(modules, hidden, attend_in_groups(query[:, :, context.shape[1] :], key, value, mask))


@functools.cache
def _fused_class(kind: type) -> type:
    return FusedDraftLayer if kind is DFlashLayer else type(f"Fused{kind.__name__}", (FusedLayer, kind), {})


def fuse_layers(model: PreTrainedModel) -> bool:
    """Fuse the decoder layers of a model whose linear layers are packed (`dpace.packing`), in place; say whether it was done.

    Query, key and value are one product, so are gate and up, norms and rotations take fewer operations. It is done for `LAYERS`, where
    the first one gives what it gave before, and for `DFlashLayer`. Hooks on layers run as before, those on modules inside them do not.

    Memory: as before. The packed copies of single weights go, one layer at a time.
    """
    layers: list[Any] = [
        layer for layer in model.modules() if type(layer).__name__ in LAYERS or type(layer) is DFlashLayer
    ]
    shared: dict[str, _Pass] = {}
    for number, layer in enumerate(layers):
        fused = _Fused(layer, shared)
        if not all(type(linear) is PackedLinear for linears in fused.linears for linear in linears):
            return False
        expected = _try_out(layer) if number == 0 else None
        layer.fused, layer.__class__ = fused, _fused_class(type(layer))
        tolerance = ROUNDING[fused.dtype]
        if expected is not None and not torch.allclose(_try_out(layer), expected, tolerance, tolerance):
            layer.fused = None
            return False
        for linears in fused.linears:
            for linear in linears:
                unpack(linear)
    return bool(layers)


@torch.no_grad()
def _try_out(layer: Any) -> Tensor:
    """What a layer gives for some rows and some rotation."""
    attention, random = layer.self_attn, torch.Generator().manual_seed(0)
    weight = attention.q_proj.weight
    rows = torch.randn(1, 3, weight.shape[1], generator=random).to(weight.dtype)
    rope = torch.randn(2, 1, 3, attention.head_dim, generator=random).to(weight.dtype)
    if isinstance(layer, DFlashLayer):
        return layer(rows[:, 1:], rows[:, :1], tuple(rope), None, None)
    return layer(rows, position_embeddings=tuple(rope))
