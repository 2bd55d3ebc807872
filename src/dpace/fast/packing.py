"""Faster linear layers on a CPU, with copies of their weights in a faster layout.

Products are the same up to rounding, in half the time or less.

Tell whether weights are still those that copies were made of.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

NUM_SAMPLES = 32
"""Values of each weight that are compared to find changes that torch does not count, as those through `.data`."""

_version = operator.attrgetter("_version")


class Snapshot:
    """Weights at a moment.

    torch counts changes of a tensor, and `is_same` asks it at each product. Changes through `.data` are not counted:
    `look_again` compares some of the values, once a request.

    Args:
        weights: what copies are made of, or what is read itself (`is_copied` False): nothing is compared then.
        parts: further snapshots to include, as they were.
    """

    def __init__(self, weights: Iterable[Tensor], parts: Iterable["Snapshot"] = (), *, is_copied: bool = True):
        self.weights = list(weights)
        self.versions, self.pointers = self._state()
        self.samples = list(map(_sample, self.weights)) if is_copied else []
        for part in parts:
            for name in ("weights", "versions", "pointers", "samples"):
                getattr(self, name).extend(getattr(part, name))

    def _state(self) -> tuple[list[int], list[int]]:
        """Give versions and addresses of the weights, which change with their values."""
        return list(map(_version, self.weights)), list(map(Tensor.data_ptr, self.weights))

    def is_same(self) -> bool:
        """Say whether no change was counted or seen."""
        return self._state() == (self.versions, self.pointers)

    def look_again(self) -> None:
        """Compare sampled values; from a difference on, the weights are not the same any more."""
        if self.samples and not all(map(torch.equal, map(_sample, self.weights), self.samples)):
            self.versions = []


def _sample(weight: Tensor) -> Tensor:
    """Take values that are spread over a weight."""
    values = weight.detach().flatten()
    return values[:: max(1, len(values) // NUM_SAMPLES)].clone()


def look_again(*owners: Any) -> None:
    """Compare the weights of models with those that their fast copies were made of, where they have any."""
    for owner in owners:
        modules = owner.modules() if isinstance(owner, nn.Module) else (owner,)
        for module in modules:
            snapshot = vars(module).get("snapshot")
            if snapshot is not None:
                snapshot.look_again()


ROWS = 8
"""Number of input rows that oneDNN's layout is chosen for; it is faster from one row to some hundreds."""
Product = Callable[[Tensor], Tensor]
"""Function from rows, "* in", to their product with a packed weight, "* out". Not differentiable."""


def pack(weight: Tensor, bias: Tensor | None = None) -> Product | None:
    """Make the product with a packed copy of a weight; None where no packed product is faster.

    On a CPU there is one in fp32, and in bf16 where the CPU has instructions for it (AVX-512 BF16, AMX). fp32 weights
    whose values are exact in 16 bits, as in most published checkpoints, are stored in 16 bits: half the bytes to read,
    and the same products in fp32.

    Memory: the copy, in 16 bits where no value changes.

    Args:
        weight: "out in".
        bias: " out"; added to the product.
    """
    if weight.device.type != "cpu":
        return None
    weight = weight.detach()
    if weight.dtype == torch.float32:
        product = _pack_in_16_bits(weight, bias)
        if product is not None:
            return product
    is_multiplied = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _multiplies_bf16())
    if not is_multiplied or not torch.backends.mkldnn.is_available():
        return None
    packed, multiply = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, bias, "none", [], "")


def _pack_in_16_bits(weight: Tensor, bias: Tensor | None) -> Product | None:
    """Make the product of fp32 rows with a weight kept in fp16, summed in fp32.

    Returns None where fp16 would change a value of the weight.

    A power of two scales the weight to make room for the small values of bf16, whose exponents reach further down; rows
    are divided by it. FBGEMM sums in the same order for any number of rows, so that a token's products do not depend on
    the tokens that are read with it.
    """
    if not _has_fp16_products():
        return None
    exponent = 0
    if not (exact := torch.equal(weight.half().float(), weight)):
        exponent = 15 - math.frexp(float(weight.abs().max().nan_to_num()))[1]
        weight = weight * 2.0**exponent
        if not torch.equal(weight.half().float(), weight):
            return None
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    multiply, scale = torch.ops.quantized.linear_dynamic_fp16.default, 2.0**-exponent
    if exact and bias is None:
        return lambda rows: multiply(rows, packed)

    def product(rows: Tensor) -> Tensor:
        out = multiply(rows if exact else rows * scale, packed)
        return out if bias is None else out + bias

    return product


def join(linears: Sequence[nn.Linear]) -> Product:
    """Make one product that gives the outputs of linear layers side by side, without packing.

    The layers' weights become parts of one tensor, which the product reads: there is no second copy.
    """
    weight, bias = (_join(linears, name) for name in ("weight", "bias"))
    return lambda rows: nn.functional.linear(rows.flatten(0, -2), weight, bias).view(*rows.shape[:-1], -1)


def _join(linears: Sequence[nn.Linear], name: str) -> Any:
    """Let the layers' parameters of a name be parts of one tensor, and give it; None where they have none."""
    parts = [getattr(linear, name) for linear in linears]
    if parts[0] is None:
        return None
    joined = torch.cat([part.detach() for part in parts]) if len(parts) > 1 else parts[0].detach()
    for linear, part, view in zip(linears, parts, joined.split([len(part) for part in parts]), strict=True):
        setattr(linear, name, nn.Parameter(view, requires_grad=part.requires_grad))
    return joined


def is_plain(weight: Any) -> bool:
    """Say whether a weight is a parameter of plain numbers, not of a quantized or distributed kind."""
    is_own_kind = not isinstance(weight, nn.Parameter) or hasattr(weight, "__tensor_flatten__")
    return not is_own_kind and weight.is_floating_point() and weight.element_size() > 1


@functools.cache
def _has_fp16_products() -> bool:
    """Say whether FBGEMM is in this build, works on this CPU, and sums in fp32."""
    rows, weight = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(0)).half().float()
    try:
        out = torch.ops.quantized.linear_dynamic_fp16(rows, torch.ops.quantized.linear_prepack_fp16(weight, None))
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(out.double(), rows.double() @ weight.double().T, rtol=0, atol=1e-4)


def _multiplies_bf16() -> bool:
    """Say whether the CPU has instructions for products in bf16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Packed:
    """A product with a packed copy of a weight, valid until the weight changes.

    Copies of its owner do not have it.

    Args:
        weight: "out in".
        bias: " out".
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self._product = pack(weight, None if bias is None else bias.detach())
        self.snapshot = Snapshot([weight] if bias is None else [weight, bias], is_copied=self._product is not None)

    def __reduce__(self):
        return type(None), ()

    @property
    def product(self) -> Product | None:
        """The product; None where there is none, and once the weight has changed."""
        return self._product if self.snapshot.is_same() else None


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with a packed copy of its weight until the weight changes."""

    packed: Packed | None = None
    snapshot: Snapshot | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Multiply as `nn.Linear` does.

        The layer stays a plain `nn.Linear` under a gradient, in another dtype, and inside `torch.compile`.
        """
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        is_compiling = torch.compiler.is_compiling()
        if not needs_grad and not is_compiling and input.dtype == self.weight.dtype and input.dim() > 1:
            product = packed_product(self)
            if product is not None:
                return product(input)
        return super().forward(input)


def packed_product(layer: PackedLinear) -> Product | None:
    """Give the layer's packed product, made at the first call; None once the weight has changed."""
    if layer.packed is None:
        layer.packed = Packed(layer.weight, layer.bias)
        layer.snapshot = layer.packed.snapshot
    is_own = layer.packed.snapshot.weights[0] is layer.weight
    return layer.packed.product if is_own else None


def pack_linears(module: nn.Module) -> bool:
    """Make all linear layers inside a module pack their weights at first use; say whether it was done.

    Quantized layers, which have classes or weights of their own, stay as they are.

    It is not done where `pack` gives no product, or where the copies would take more than half of the free memory.

    Memory: a second copy of the weights, or half of one, see `pack`.
    """
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    is_room = 2 * size <= psutil.virtual_memory().available
    if not is_room or not layers or any(pack(layer.weight[:1, :1]) is None for layer in layers):
        return False
    for layer in layers:
        layer.__class__ = PackedLinear
    return True


def unpack(layer: nn.Module) -> None:
    """Turn a layer back into an `nn.Linear`, without the copy of its weight."""
    vars(layer).pop("packed", None)
    vars(layer).pop("snapshot", None)
    layer.__class__ = nn.Linear
