import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.attention.bias import CausalBias
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from dpace.drafter import load_drafter
from dpace.fast.attention import MAX_QUERIES, NAME, attend_in_groups, group_heads
from dpace.fast.cache import TextCache
from dpace.fast.fusion import FusedDraftLayer, FusedLayer, fuse_layers
from dpace.fast.packing import PackedLinear, pack_linears
from dpace.target import Target
from tests.support.models import _SHAPE, FAMILIES, VOCAB, make_target, make_with_convolutions

KNOWN = {
    **{name: FAMILIES[name] for name in ("llama3.1", "smollm2", "qwen3")},
    "llama with biases": lambda: LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3 with biases": lambda: Qwen3Config(**_SHAPE, attention_bias=True),
    "mistral": lambda: MistralConfig(**{**_SHAPE, "sliding_window": 8}),
    "qwen2": lambda: Qwen2Config(**{name: value for name, value in _SHAPE.items() if name != "head_dim"}),
}


def make_model(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KNOWN[kind](), dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases and norms, which begin as 0 and 1
            nn.init.normal_(parameter, mean="norm" in name, std=0.2)
    pack_linears(model)
    group_heads(model)
    return model


@torch.no_grad()
def run(model) -> list[torch.Tensor]:
    """What some layers and the decoder give for a prompt, a verification and a token of two rows."""
    target, found = Target(model), []
    cache = TextCache(target.config, 32)
    target.refresh_copies()
    for tokens in torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1)).split([14, 5, 1], 1):
        found += target.read(tokens, cache, range(1, target.num_layers))
    return found


def skip_without_products(model):
    if not any(type(module) is PackedLinear for module in model.modules()):
        pytest.skip("this CPU does not multiply bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_fused_layers_give_what_those_of_transformers_give(kind, dtype):
    model = make_model(kind, dtype)
    skip_without_products(model)
    expected, parameters = run(model), dict(model.named_parameters())
    assert fuse_layers(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)  # in bf16 too: it rounds where they do
    assert dict(model.named_parameters()) == parameters
    layers = Target(model).layers
    assert all(isinstance(layer, FusedLayer) and layer.fast for layer in layers)
    assert not any(type(module) is PackedLinear for module in layers.modules())
    norm, rows = layers[1].post_attention_layernorm, 9 * torch.randn(2, 5, 48, dtype=dtype)
    assert torch.equal(layers[1].fast.norm(rows, 1), norm(rows))


@torch.no_grad()
def test_a_step_passes_by_the_decoders_own_code(monkeypatch):
    """Not for prompts, another attention, a decoder with code of its own, and changed layers."""
    model = make_model("qwen3")
    assert fuse_layers(model)
    target = Target(model)
    tokens = torch.randint(VOCAB, (1, MAX_QUERIES + 8))
    calls = []
    forward = target.decoder.forward
    monkeypatch.setattr(target.decoder, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))

    def read(count):
        target.hidden(tokens[:, :count], cache=DynamicCache(config=target.config))

    read(MAX_QUERIES)
    assert not calls
    read(MAX_QUERIES + 1)
    target.decoder.set_attn_implementation("eager")
    read(4)
    target.decoder.set_attn_implementation(NAME)
    kind = type(target.decoder)
    target.decoder.__class__ = types.new_class("OtherModel", (kind,))
    read(4)
    target.decoder.__class__ = kind
    assert len(calls) == 3
    target.layers[0].self_attn.k_proj.weight.mul_(2)
    target.refresh_copies()
    read(4)
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says why it takes no kernel of a GPU
@torch.no_grad()
def test_a_verification_on_cuda_needs_no_mask_of_numbers(monkeypatch):
    """There the kernel is told that the mask is causal; the results are the same."""
    model = make_model("llama3.1")
    assert fuse_layers(model)
    expected = run(model)
    masks = []

    def watched(query, key, value, mask, scale, **options):
        masks.append(mask)
        return attend_in_groups(query, key, value, mask, scale)

    monkeypatch.setattr("dpace.fast.fusion.attend_in_groups", watched)
    monkeypatch.setattr("dpace.fast.attention.has_causal_kernel", lambda rows: True)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    assert {type(mask) for mask in masks if mask is not None} == {CausalBias}


@torch.no_grad()
def test_the_drafters_layers(tmp_path, language_target):
    """Of one block, of several texts, and of a text that is measured, whose slots are many."""
    make_with_convolutions(language_target).save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path, language_target)
    assert {type(layer) for layer in drafter.layers} == {FusedDraftLayer}
    plain = copy.deepcopy(drafter)  # copies are not fused
    assert not any(layer.fast for layer in plain.layers)
    padding = (torch.rand(2, 7) > 0.3) | (torch.arange(7) > 2)
    for batch, slots, mask in [(1, 4, None), (2, 4, padding), (1, 4, "by slot"), (1, MAX_QUERIES + 4, "by slot")]:
        if mask == "by slot":
            mask = torch.ones(1, 1, slots, 3 + slots, dtype=torch.bool).tril(3)
        inputs = torch.randn(batch, slots, 48), torch.randn(batch, 3, 96), torch.arange(3 + slots)[None]
        found = []
        for model in (drafter, plain):
            cache = TextCache(drafter.config, 3 + slots)
            hidden = model(*inputs, attention_mask=mask, cache=cache).last_hidden_state
            found.append([hidden, cache.layers[1].buffers[0]])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def exchange_module(layer):
    """As adapters do."""
    inner = layer.self_attn.q_proj
    layer.self_attn.q_proj = nn.Sequential(inner, nn.Linear(inner.out_features, inner.out_features))


CHANGES = {
    "in place": lambda layer: layer.self_attn.k_proj.weight.mul_(2),
    "adapter": exchange_module,
    "data": lambda layer: setattr(layer.self_attn.o_proj.weight, "data", 2 * layer.self_attn.o_proj.weight.data),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_new_weights_are_not_missed(change):
    model = make_model("qwen3 with biases")
    assert fuse_layers(model)
    before = run(model)
    CHANGES[change](model.get_decoder().layers[0])
    found = run(model)
    plain = copy.deepcopy(model)
    assert not torch.allclose(found[-1], before[-1])
    torch.testing.assert_close(found, run(plain), rtol=1e-5, atol=1e-6)


def test_gradients_and_other_attention_run_the_models_own_code():
    model = make_target("llama3.1").model
    tokens = torch.randint(VOCAB, (1, 9))
    expected = model(tokens).logits
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0
    model.get_decoder().set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("error", "is_fused"), [(0.0, True), (0.03, False), (float("nan"), False)])
def test_layers_that_round_otherwise_are_fused_and_wrong_ones_are_not(error, is_fused, monkeypatch):
    """In bf16 with outputs of some hundreds, and with norms that round once, as on a GPU."""

    def norm(self, rows, index):
        return torch.rms_norm(rows, self.norms[index].shape, self.norms[index], self.epsilon) * (1 + error)

    monkeypatch.setattr("dpace.fast.fusion.FusedProducts.norm", norm)
    model = make_model("llama3.1", torch.bfloat16)
    skip_without_products(model)
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.weight.data *= 1e4
    assert fuse_layers(model) is is_fused


def test_other_models_are_left_as_they_are():
    assert not fuse_layers(make_target("gemma2").model)
    assert not fuse_layers(AutoModelForCausalLM.from_config(KNOWN["qwen3"]()))  # not packed
    changed = make_model("qwen3")
    first = changed.get_decoder().layers[0]
    kind = types.new_class("Qwen3DecoderLayer", (type(first),))  # by its name only
    kind.forward = lambda self, *args, **kwargs: 2 * super(kind, self).forward(*args, **kwargs)
    first.__class__ = kind
    expected = run(changed)
    assert not fuse_layers(changed)
    torch.testing.assert_close(run(changed), expected)
    assert type(first) is kind and type(first.mlp.up_proj) is PackedLinear
