import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpace.attention import NAME, group_heads, grouped_attention
from tests.conftest import make_target


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 3, True


def draw(queries: int, dtype: torch.dtype, key_heads: int = 2):
    query = torch.randn(2, 6, queries, 16, dtype=dtype)
    return query, *(torch.randn(2, key_heads, 40, 16, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("mask", ["none", "visible", "added"])
def test_grouped_attention_is_sdpa(queries, dtype, mask):
    tensors = draw(queries, dtype)
    visible = torch.arange(40) <= torch.randint(5, 40, (2, 1, queries, 1))
    added = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    given = {"none": None, "visible": visible, "added": added}[mask]
    found, _ = grouped_attention(Layer(), *tensors, given, scaling=0.3)
    expected, _ = sdpa_attention_forward(Layer(), *tensors, given, scaling=0.3)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **close)
    assert found.is_contiguous()


def test_other_cases_are_left_to_sdpa(monkeypatch):
    calls = []

    def sdpa(_module, query, *args, **kwargs):
        calls.append(args)
        return query, None

    monkeypatch.setattr("dpace.attention.sdpa_attention_forward", sdpa)
    heads = torch.ones(2, 6, 1, 40, dtype=torch.bool)
    grouped_attention(Layer(), *draw(5, torch.float32), None)  # causal, without a cache
    grouped_attention(Layer(), *draw(1, torch.float32, key_heads=6), None)
    grouped_attention(Layer(), *draw(1, torch.float32), heads)
    grouped_attention(Layer(), *draw(1, torch.float32), heads[:, :1], softcap=1.0)
    grouped_attention(Layer(), *draw(1, torch.float32), None, position_bias=torch.zeros(1, 6, 1, 40))
    assert len(calls) == 5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_only_sdpa_is_replaced(implementation):
    target = make_target("qwen3", _attn_implementation=implementation)
    group_heads(target.model)
    assert target.config._attn_implementation == (NAME if implementation == "sdpa" else implementation)
