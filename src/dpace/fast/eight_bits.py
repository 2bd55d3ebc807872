"""Linear layers in 8 bits on a CPU, in which a row's numbers do not depend on the rows that are read with it.

`to_eight_bits` takes a model whose decoder layers are of `nn.Linear`, and tokens of a text; the linear layers of its
decoder layers, and its LM head, then multiply in 8 bits. Each row is divided by its own largest value, and whole
numbers are summed without rounding: a block of tokens has the same products as each of its tokens alone.

Channels whose values are large are divided before the product, and the weight is multiplied instead (SmoothQuant, arXiv
2211.10438). These divisors follow from the weights and from the values that the text gave.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpace.fast.attention import EXACT, group_heads
from dpace.fast.packing import FBGEMM, Product

LARGEST = 127
"""The largest number of 8 bits, on both sides of 0."""
ZERO = 128
"""What stands for 0 in a row, whose numbers have no sign."""
TINY = 1e-5
"""The least largest value of a channel that counts, of rows and of weights."""
USE = "leave --dtype out, or use float32 or bfloat16"


class EightBitProduct(NamedTuple):
    """The product of rows with a weight in 8 bits; "* in" in fp32 becomes "* out"."""

    packed: Any
    """The weight as `pack_eight_bits` returns it."""
    factors: Float[Tensor, " in"]
    """What rows are multiplied by: 1 over the divisors."""
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        """Round rows to 8 bits, multiply and scale; a row of zeros gives zeros."""
        rows = rows * self.factors
        largest = rows.abs().amax(-1, keepdim=True)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op
        out = multiply(rows.div_(largest), 1 / LARGEST, ZERO, self.packed).mul_(largest)
        return out if self.bias is None else out.add_(self.bias)


class EightBitLinear(nn.Linear):
    """A linear layer that multiplies in 8 bits; its own weight is gone, unless others read it too."""

    product: Product

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, in any dtype of rows; not differentiable."""
        return self.product(input.float()).to(input.dtype)


def is_in_eight_bits(model: PreTrainedModel) -> bool:
    """Return whether `to_eight_bits` was called with a model."""
    return isinstance(model.get_output_embeddings(), EightBitLinear)


def round_weight(weight: Float[Tensor, "out in"]) -> tuple[Int[Tensor, "out in"], Float[Tensor, " out"]]:
    """Round a weight to whole numbers of 8 bits, with the scale of each output that they are multiplied by."""
    scales = weight.abs().amax(1).clamp_(min=TINY * TINY) / LARGEST
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def pack_eight_bits(integers: Int[Tensor, "out in"], scales: Float[Tensor, " out"]) -> Any:
    """Pack a weight for FBGEMM, from torch's engine of quantized products.

    torch warns that quantized tensors will be removed (pytorch#184982). `torch.ops.onednn.qlinear_prepack` and
    `qlinear_pointwise` take plain ones and give the same numbers; rows are then rounded by operations of their own,
    which takes up to twice as long.
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        zeros = torch.zeros(len(scales), dtype=torch.long)
        weight: Any = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateImportUsage]
            integers, scales.double(), zeros, 0
        )
    return torch.ops.quantized.linear_prepack(weight, None)


def join_eight_bits(linears: Sequence[EightBitLinear]) -> Product:
    """Make one product of layers that read the same rows, and let each take its part of it."""
    weights = [torch.ops.quantized.linear_unpack(linear.product.packed)[0] for linear in linears]
    packed = pack_eight_bits(
        torch.cat([weight.int_repr() for weight in weights]),
        torch.cat([weight.q_per_channel_scales() for weight in weights]),
    )
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    joined = EightBitProduct(packed, linears[0].product.factors, torch.cat(biases) if biases else None)
    end = 0
    for linear in linears:
        start, end = end, end + linear.out_features
        linear.product = lambda rows, part=slice(start, end): joined(rows)[..., part]
    return joined


def sums_exactly() -> bool:
    """Find out whether this CPU's kernel sums products of 8 bits without rounding; some saturate at 16 bits."""
    if torch.backends.quantized.engine not in FBGEMM:
        return False
    ones = torch.ones(1, 64)
    product = EightBitProduct(pack_eight_bits(LARGEST * ones.to(torch.int8), ones[0, :1]), ones[0], None)
    return float(product(ones)) == 64 * LARGEST


@torch.no_grad()
def to_eight_bits(model: PreTrainedModel, layers: nn.ModuleList, token_ids: Int[Tensor, "1 seq"]) -> None:
    """Let the decoder layers and the LM head of a model in fp32 on a CPU multiply in 8 bits, in place.

    Attention is computed in fp64, see `dpace.fast.attention.exact_attention`.

    Memory: one byte a weight of layers and head. The layers' own weights are freed; the tables of embedding and head
    stay, as drafters read them.

    Args:
        model: decoder, norm and head.
        layers: its decoder layers.
        token_ids: a text, whose largest values decide about the divisors.

    Raises:
        ValueError: the CPU has no kernel that sums without rounding, layers have other weights than those of
            `nn.Linear` and vectors, or the model does not take attention by name.
    """
    if not sums_exactly():
        raise ValueError(f"--dtype int8 needs sums of 8 bits without rounding, which CPUs with VNNI have; {USE}")
    head: Any = model.get_output_embeddings()
    modules = [*layers.modules(), head]
    linears = [module for module in modules if type(module) is nn.Linear]
    known = {id(linear.weight) for linear in linears}
    has_others = any(weight.dim() > 1 and id(weight) not in known for weight in layers.parameters())
    if has_others or head not in linears or not group_heads(model, EXACT):
        raise ValueError(
            f"--dtype int8 needs layers of nn.Linear and attention by name; {type(model).__name__} has others; {USE}"
        )
    for largest, group in _find_groups(model, linears, token_ids):
        columns = torch.stack([linear.weight.abs().amax(0) for linear in group]).amax(0)
        ratios = largest.clamp(min=TINY) / columns.clamp(min=TINY)
        # Their squares are powers of two: another machine, where values are rounded otherwise, has the same ones.
        divisors = ratios.log2().round().exp2().sqrt()
        for linear in group:
            integers, scales = round_weight(linear.weight * divisors)
            linear.product = EightBitProduct(pack_eight_bits(integers, scales), 1 / divisors, linear.bias)
            linear.register_buffer("scales", scales)  # for the fingerprint of the weights
            if linear is not head:
                linear.weight = None
            linear.__class__ = EightBitLinear


def _find_groups(
    model: PreTrainedModel, linears: Sequence[nn.Module], token_ids: Int[Tensor, "1 seq"]
) -> list[tuple[Float[Tensor, " in"], list[Any]]]:
    """Let a model read a text; return the layers that read the same rows, with the largest value of each channel."""
    groups: list[tuple[Tensor, list[Any]]] = []
    last_rows = None

    def read(linear: nn.Module, inputs: tuple[Tensor]) -> None:
        """Add a layer to the last group, or to a new one where its rows are others."""
        nonlocal last_rows
        if inputs[0] is not last_rows:
            last_rows = inputs[0]
            groups.append((last_rows.abs().flatten(0, -2).amax(0), []))
        groups[-1][1].append(linear)

    hooks = [linear.register_forward_pre_hook(read) for linear in linears]
    model(token_ids)
    for hook in hooks:
        hook.remove()
    return groups
