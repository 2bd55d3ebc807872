import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dpace.fast.attention
from dpace.fast.attention import MAX_QUERIES, NAME, group_heads, grouped_attention
from dpace.target import Target
from tests.support.models import FAMILIES


class Layer(torch.nn.Module):
    is_causal = True


def draw(queries: int, dtype: torch.dtype = torch.float32, key_heads: int = 2):
    query = torch.randn(2, 6, queries, 16, dtype=dtype)
    return query, *(torch.randn(2, key_heads, 80, 16, dtype=dtype) for _ in range(2))


def make_mask(queries: int, kind: str, dtype: torch.dtype = torch.float32):
    visible = torch.arange(80) <= torch.randint(5, 80, (2, 1, queries, 1))
    added = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return {"none": None, "visible": visible, "added": added}[kind]


@pytest.fixture
def left_to_sdpa(monkeypatch) -> list:
    """The calls that `sdpa` gets."""
    calls = []

    def sdpa(_module, query, *args, **kwargs):
        calls.append(args)
        return query, None

    monkeypatch.setattr(dpace.fast.attention, "sdpa_attention_forward", sdpa)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "kind"), [(1, "none"), *((q, k) for q in (1, 2, 5) for k in ("visible", "added"))])
def test_grouped_attention_is_sdpa(queries, kind, dtype, left_to_sdpa):
    """Also in layers that are not alike; the mask is made once for those that are."""
    mask = make_mask(queries, kind, dtype)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for key_heads in (2, 3, 2):
        layer = Layer()
        layer.num_key_value_groups = 6 // key_heads
        tensors = draw(queries, dtype, key_heads)
        found, _ = grouped_attention(layer, *tensors, mask, scaling=0.3)
        expected, _ = sdpa_attention_forward(layer, *tensors, mask, scaling=0.3)
        torch.testing.assert_close(found, expected, **close)
    assert queries == 1 or [repeated.shape[2] for repeated in mask.repeated.values()] == [3 * queries, 2 * queries]


def test_other_cases_are_left_to_sdpa(left_to_sdpa):
    one, by_head = make_mask(1, "visible"), torch.ones(2, 6, 1, 80, dtype=torch.bool)
    grouped_attention(Layer(), *draw(5), None)  # a prompt
    grouped_attention(Layer(), *draw(MAX_QUERIES + 1), make_mask(MAX_QUERIES + 1, "visible"))
    grouped_attention(Layer(), *draw(5), one)  # the same row for all queries
    grouped_attention(Layer(), *draw(1, key_heads=6), None)
    grouped_attention(Layer(), *draw(1), by_head)
    grouped_attention(Layer(), *draw(1), one, softcap=1.0)
    grouped_attention(Layer(), *draw(1), None, position_bias=torch.zeros(1, 6, 1, 80))
    assert len(left_to_sdpa) == 7


def test_a_loaded_target_uses_it(language_folder):
    target = Target.load(str(language_folder))
    assert target.config._attn_implementation == NAME
    target.model.save_pretrained(language_folder.parent / "saved")
    assert NAME not in (language_folder.parent / "saved" / "config.json").read_text()


def test_other_implementations_and_models_that_ask_for_sdpa_stay(monkeypatch):
    eager, sdpa = (
        AutoModelForCausalLM.from_config(FAMILIES["qwen3"](), attn_implementation=kind) for kind in ("eager", "sdpa")
    )
    assert not group_heads(eager) and eager.config._attn_implementation == "eager"
    with monkeypatch.context() as patch:
        patch.setattr("inspect.getsource", lambda _: 'if kind in ("eager", "sdpa"):')
        assert not group_heads(sdpa)
    assert group_heads(sdpa) and sdpa.config._attn_implementation == NAME
