import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from dpace.fast.packing import (
    PackedLinear,
    _pack_in_16_bits,
    has_fast_bf16,
    join,
    pack,
    pack_linears,
    refresh_copies,
)


@pytest.mark.parametrize("num_rows", [1, 7, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_those_of_linear(num_rows, bias, dtype):
    layer = nn.Linear(48, 33, bias=bias).requires_grad_(False).to(dtype).eval()
    x = torch.randn(2, num_rows, 48, dtype=dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    is_fast = pack_linears(layer)
    assert is_fast == (type(layer) is PackedLinear) == (dtype == torch.float32 or has_fast_bf16())
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), exact.to(dtype), **close)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits_are_read_as_such_and_lose_nothing(kind):
    """In fp32, from the largest to the smallest; and a row's product is the same whatever rows are beside it.

    With AVX2 that is so where no one or two rows remain: FBGEMM takes three to six at a time in one order.
    """
    weight = (torch.randn(96, 700) * 2.0 ** torch.randint(-12, 0, (96, 700))).to(kind).float()
    weight[0, :3] = torch.tensor([3.0, 2.0**-24, 0.0])  # 2 ** -24 is the smallest number of fp16
    bias, rows = torch.randn(96), torch.randn(1, 40, 700)
    product = pack(weight, bias)
    assert torch.equal(product(torch.eye(700)[None])[0], weight.T + bias)
    exact = rows.double() @ weight.double().T + bias
    torch.testing.assert_close(product(rows), exact.float(), rtol=1e-5, atol=1e-4)
    for count in (1, 2, 7, 8, 13, 15) if torch.cpu._is_avx512_supported() else (3, 8, 13, 15):
        assert torch.equal(product(rows[:, :count]), product(rows)[:, :count])


def test_numbers_of_more_bits_stay_what_they_are():
    weight = torch.randn(8, 8)
    assert _pack_in_16_bits(weight, None) is None and pack(weight) is not None
    spread = torch.tensor([[1e9, 1e-9]]).bfloat16().float()
    assert _pack_in_16_bits(spread, None) is None
    assert _pack_in_16_bits(torch.tensor([[1.0, torch.nan]]), None) is None


@torch.no_grad()
def test_new_weights_are_not_missed():
    """Changed in place, copied, or in another dtype: never the old product."""
    layer = nn.Linear(8, 4).eval()
    pack_linears(layer)
    x = torch.randn(3, 8)
    for _ in range(2):
        layer.weight.mul_(2)
        refresh_copies(layer)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer.fast.product is not None
    other = copy.deepcopy(layer)
    other.weight.zero_()
    torch.testing.assert_close(other(x), other.bias.expand(3, -1))
    assert other.double()(x.double()).dtype == torch.float64


@torch.no_grad()
def test_joined_layers_share_one_tensor_and_are_saved_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr("dpace.fast.packing.pack", lambda *_: None)
    layers = nn.ModuleList(nn.Linear(8, size) for size in (4, 6, 2))
    before, rows = copy.deepcopy(layers), torch.randn(2, 3, 8)
    product = join(list(layers))
    for both in (before, layers):
        both[1].weight.data.mul_(2)  # the weights are read themselves
    torch.testing.assert_close(product(rows), torch.cat([layer(rows) for layer in before], dim=-1))
    safetensors.torch.save_file(layers.state_dict(), tmp_path / "layers")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "layers")["2.weight"], before[2].weight)


def test_nothing_is_packed_without_room(monkeypatch):
    monkeypatch.setattr("dpace.fast.packing.psutil.virtual_memory", lambda: type("Memory", (), {"available": 100}))
    assert not pack_linears(nn.Linear(48, 33))


@pytest.mark.parametrize(("has_instructions", "is_taken"), [(True, True), (True, False), (False, True)])
def test_bf16_is_fast_where_the_cpu_has_instructions_and_onednn_takes_them(has_instructions, is_taken, monkeypatch):
    """The second: a container hides a part of the CPU. The third: oneDNN would emulate bf16. Nothing is packed then."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_taken)
    is_fast = has_instructions and is_taken
    assert has_fast_bf16() == is_fast
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    if not is_fast:
        assert pack(layer.weight) is None and not pack_linears(layer) and type(layer) is nn.Linear
