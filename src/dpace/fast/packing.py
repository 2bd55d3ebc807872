"""Faster linear layers on a CPU: products with copies of their weights in a faster layout.

`pack` takes a weight and returns its product. Up to rounding it equals the product of `nn.Linear`, in half the time or
less. `pack_linears` lets the linear layers of a model use such products, and `refresh_copies` drops what was made of
weights that have changed since; decoding calls it once a request.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

ROWS = 8
"""Number of input rows that oneDNN's layout is chosen for; it is faster from one row to some hundreds."""
FBGEMM = ("fbgemm", "x86")
"""torch's engines of quantized products, by default on a CPU with AVX2, in which FBGEMM multiplies with fp16."""
Product = Callable[[Tensor], Tensor]
"""Function from rows, "* in", to their product with a packed weight, "* out". Not differentiable."""


def pack_linears(module: nn.Module) -> bool:
    """Make all linear layers inside a module pack their weights at first use; return whether it was done.

    Quantized layers, which have classes or weights of their own, stay as they are. It is not done where `pack` gives no
    product, or where the copies would take more than half of the free memory.

    Memory: a second copy of the weights, or half of one, see `pack`.
    """
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter]
    num_bytes = sum(layer.weight.nbytes for layer in layers)
    if not layers or 2 * num_bytes > psutil.virtual_memory().available:
        return False
    # One number of each weight is packed for a try, since a weight's device and dtype decide.
    if any(pack(layer.weight[:1, :1]) is None for layer in layers):
        return False
    for layer in layers:
        # The class is exchanged, and not the module, so that names of parameters and references to it stay.
        layer.__class__ = PackedLinear
    return True


def unpack(linears: Iterable[nn.Module]) -> None:
    """Make packed layers plain ones again, without their copies: something else computes with their weights."""
    for linear in linears:
        vars(linear).pop("fast", None)
        linear.__class__ = nn.Linear


def refresh_copies(model: nn.Module) -> None:
    """Drop what was made of weights that have changed since; a packed copy is made again at its next use.

    One comparison of each weight's id, address and number of changes, as torch counts them. torch does not count
    changes through `.data`: who edits weights in that way has to load the model again.
    """
    for module in model.modules():
        if isinstance(module, FastModule) and module.fast and module.fast.state != weights_state(module.parameters()):
            module.fast = None


def weights_state(weights: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """Return what differs once a weight is exchanged, moved or changed: ids, addresses and numbers of changes."""
    return [(id(weight), weight.data_ptr(), weight._version) for weight in weights]


class FastForm:
    """A form of a module's weights that its fast code reads, valid until a weight changes.

    For a linear layer it is the product. A copy of the module has None in its place.
    """

    def __init__(self, module: nn.Module, product: "Product | None" = None):
        self.state = weights_state(module.parameters())
        self.product = product

    def __reduce__(self):
        """Copy and pickle as None."""
        return type(None), ()


class FastModule(nn.Module):
    """A module that computes with a fast form of its weights, and with its own code while there is none."""

    fast: Any = None

    def is_usable(self, rows: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a fast form in a dtype may be used: same dtype, no training and no gradient.

        `torch.compile` combines products and norms itself, so it gets the model's own code.
        """
        needs_own_code = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        return rows.dtype == dtype and not needs_own_code

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the weights, and drop their fast form."""
        self.fast = None
        return super()._apply(*args, **kwargs)


class PackedLinear(FastModule, nn.Linear):
    """A linear layer that multiplies with a packed copy of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply as `nn.Linear` does."""
        if self.is_usable(input, self.weight.dtype) and input.dim() > 1:
            if self.fast is None:
                self.fast = FastForm(self, pack(self.weight, self.bias))
            if self.fast.product is not None:
                return self.fast.product(input)
        return super().forward(input)


@torch.no_grad()
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
    if weight.dtype == torch.float32:
        product = _pack_in_16_bits(weight, bias)
        if product is not None:
            return product
    is_fast_bf16 = weight.dtype == torch.bfloat16 and has_fast_bf16()
    if not (weight.dtype == torch.float32 or is_fast_bf16) or not torch.backends.mkldnn.is_available():
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, bias, "none", [], "")


def _pack_in_16_bits(weight: Tensor, bias: Tensor | None) -> Product | None:
    """Make the product of fp32 rows with a weight kept in fp16, summed in fp32.

    Returns None where fp16 would change a value of the weight.

    A power of two scales the weight to make room for the small values of bf16, whose exponents reach further down; rows
    are divided by it. With AVX-512, FBGEMM sums in the same order for any number of rows, so that a token's products do
    not depend on the tokens that are read with it. With AVX2 only, it sums in another order where its last one or two
    rows remain; products then differ by rounding in fp32.
    """
    if torch.backends.quantized.engine not in FBGEMM or not torch.cpu._is_avx2_supported():
        return None
    largest = float(weight.abs().max().nan_to_num())
    # As they are, or with the largest value from 2 ** 14 to 2 ** 15: numbers of fp16 go up to nearly 2 ** 16.
    for exponent in (0, 15 - math.frexp(largest)[1]):
        scaled = weight * 2.0**exponent
        if torch.equal(scaled.half().float(), scaled):
            break
    else:
        return None
    packed = torch.ops.quantized.linear_prepack_fp16(scaled, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default._op  # without a check of fake weights, which takes long

    def product(rows: Tensor) -> Tensor:
        if exponent:
            rows = rows * 2.0**-exponent
        out = multiply(rows, packed)
        return out if bias is None else out + bias

    return product


def has_fast_bf16() -> bool:
    """Find out whether products in bf16 are fast on this CPU: the CPU has instructions for them, and oneDNN takes them.

    oneDNN emulates bf16 on CPUs without such instructions, and refuses it where `ONEDNN_MAX_CPU_ISA` hides too much of
    the CPU.
    """
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_in_build = torch.backends.mkldnn.is_available()
    return has_instructions and is_in_build and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def join(linears: Sequence[nn.Linear]) -> Product:
    """Make one product that gives the outputs of linear layers side by side.

    It is packed where that is faster. Elsewhere the weights become parts of one tensor, which the product reads: there
    is no second copy.
    """
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    weight = torch.cat(weights).detach()
    bias = torch.cat(biases).detach() if biases else None
    product = pack(weight, bias)
    if product is not None:
        return product
    _become_views(weights, weight)
    if bias is not None:
        _become_views(biases, bias)
    # Of a plain matrix of rows, which takes torch one operation.
    return lambda rows: nn.functional.linear(rows.flatten(0, -2), weight, bias).view(*rows.shape[:-1], -1)


def _become_views(parameters: Sequence[Tensor], whole: Tensor) -> None:
    """Let parameters be views of a tensor that holds their values one after the other, so that it is no second copy."""
    views = whole.split([len(parameter) for parameter in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view


def is_plain(weight: Any) -> bool:
    """Return whether a weight is a parameter of plain numbers, not of a quantized or distributed kind."""
    if not isinstance(weight, nn.Parameter) or hasattr(weight, "__tensor_flatten__"):
        return False  # which tensors of several parts have
    return weight.is_floating_point() and weight.element_size() > 1
