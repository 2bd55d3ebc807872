"""Linear layers on a CPU with their weights also in oneDNN's own layout: same products up to rounding, in half the time."""

import weakref

import psutil
import torch
from torch import Tensor, nn

ROWS = 8
"""Rows of input that the layout is chosen for; it is faster from one row to some hundreds."""

_packed: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = weakref.WeakKeyDictionary()


def pack(weight: Tensor) -> Tensor | None:
    """A copy in oneDNN's layout for `multiply`; None where that is not faster.

    It is on a CPU in fp32, and in bf16 where the CPU multiplies that (AVX-512 BF16, AMX).
    """
    is_multiplied = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _multiplies_bf16())
    if weight.device.type != "cpu" or not is_multiplied or not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiply(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear(rows, weight, bias)` with the weight as `pack` gave it; not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with the packed copy of its weight while that is the weight it was packed from."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`; it also stays that under a gradient, in another dtype, and where it is compiled."""
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if not needs_grad and not torch.compiler.is_compiling() and input.dtype == self.weight.dtype:
            packed = packed_weight(self)
            if packed is not None:
                return multiply(input, packed, self.bias)
        return super().forward(input)


def packed_weight(layer: nn.Module) -> Tensor | None:
    """The copy that `pack_linears` made, while it is one of the layer's weight."""
    state, packed = _packed.get(layer, (None, None))
    return packed if packed is not None and state == _state(layer.weight) else None


def _state(weight) -> tuple[int, int]:
    """Changes with the values."""
    return weight.data_ptr(), weight._version


def pack_linears(module: nn.Module) -> bool:
    """Pack all linear layers inside a module, in place; say whether it was done.

    Nothing is done where `pack` gives nothing, and where the copies would take more than half of the free memory.

    Memory: a second copy of the weights.
    """
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if not layers or 2 * size > psutil.virtual_memory().available:
        return False
    for layer in layers:
        packed = pack(layer.weight)
        if packed is None:
            return False
        _packed[layer] = (_state(layer.weight), packed)
        layer.__class__ = PackedLinear
    return True


def unpack(layer: nn.Module) -> None:
    """Make a packed layer an `nn.Linear` again, without the copy of its weight."""
    _packed.pop(layer, None)
    layer.__class__ = nn.Linear
