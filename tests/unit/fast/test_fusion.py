import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.attention.bias import CausalBias
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from dpace.drafter import load_drafter
from dpace.fast.attention import MAX_QUERIES, attend_in_groups, group_heads
from dpace.fast.cache import TextCache
from dpace.fast.fusion import FusedDraftLayer, FusedLayer, fuse_layers
from dpace.fast.packing import PackedLinear, pack_linears
from dpace.target import Target
from tests.conftest import _SHAPE, FAMILIES, VOCAB, make_drafter, make_target, make_with_convolutions

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_fused_layers_give_what_those_of_transformers_give(kind, dtype):
    model = make_model(kind, dtype)
    if not any(type(module) is PackedLinear for module in model.modules()):
        pytest.skip("this CPU does not multiply bf16")
    expected, parameters = run(model), dict(model.named_parameters())
    assert fuse_layers(model)
    assert all(isinstance(layer, FusedLayer) and layer.fast for layer in Target(model).layers)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)  # in bf16 too: it rounds where they do
    assert dict(model.named_parameters()) == parameters
    assert not any(type(m) is PackedLinear for layer in Target(model).layers for m in layer.modules())


@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 8, 48), (2, 5, 48)])
def test_a_norm_has_the_bits_of_torchs(shape):
    model = make_model("llama3.1")
    assert fuse_layers(model)
    layer = model.get_decoder().layers[1]
    norm, rows = layer.post_attention_layernorm, 9 * torch.randn(shape)
    expected = torch.rms_norm(rows, norm.weight.shape, norm.weight, norm.variance_epsilon)
    assert torch.equal(layer.fast.norm(rows, 1), expected) and torch.equal(norm(rows), expected)


@torch.no_grad()
def test_a_step_passes_by_the_decoders_own_code(monkeypatch):
    """For one row or several of different lengths; not for prompts, and changed layers."""
    target = Target(make_model("qwen3"))
    assert fuse_layers(target.model)
    target = Target(target.model)
    tokens = torch.randint(VOCAB, (1, MAX_QUERIES + 8))
    cache = TextCache(target.config, tokens.shape[1])
    target.hidden(tokens[:, : MAX_QUERIES + 1], cache=cache)
    calls = []
    forward = target.decoder.forward
    monkeypatch.setattr(target.decoder, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    target.hidden(tokens[:, -7:-1], cache=cache)
    target.hidden(tokens[:, -1:], cache=cache)
    target.hidden(tokens[:, :4], cache=DynamicCache(config=target.config))
    assert not calls
    target.hidden(tokens, cache=TextCache(target.config, tokens.shape[1]))
    target.decoder.layers[0].self_attn.k_proj.weight.mul_(2)
    target.refresh_copies()
    target.hidden(tokens[:, :4], cache=TextCache(target.config, 4))
    assert len(calls) == 2


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


@pytest.mark.parametrize("make", [make_drafter, make_with_convolutions])
def test_the_drafters_layers(make, tmp_path, language_target):
    make(language_target).save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path, language_target)
    assert {type(layer) for layer in drafter.layers} == {FusedDraftLayer}
    plain = copy.deepcopy(drafter)  # copies are not fused
    assert not any(layer.fast for layer in plain.layers)
    width = language_target.hidden_size
    for batch, masked in [(1, False), (2, False), (2, True)]:
        inputs = torch.randn(batch, 4, width), torch.randn(batch, 3, 2 * width), torch.arange(7)[None]
        mask = (torch.rand(batch, 7) > 0.3) | (torch.arange(7) > 2) if masked else None
        caches = [TextCache(drafter.config, 7) for _ in range(2)]
        with torch.no_grad():
            found, expected = (
                model(*inputs, attention_mask=mask, cache=cache).last_hidden_state
                for model, cache in zip((drafter, plain), caches, strict=True)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        ours, theirs = (cache.layers[1] for cache in caches)
        assert ours.length == theirs.length > 0
        torch.testing.assert_close(ours.buffers[0], theirs.buffers[0], rtol=1e-5, atol=1e-6)
    for slots in (4, MAX_QUERIES + 4):  # those of a text that is measured are many
        by_slot = torch.ones(1, 1, slots, 3 + slots, dtype=torch.bool).tril(3)
        inputs = torch.randn(1, slots, width), inputs[1][:1], torch.arange(3 + slots)[None]
        with torch.no_grad():
            found, expected = (m(*inputs, attention_mask=by_slot).last_hidden_state for m in (drafter, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def exchange_module(layer):
    """As adapters do."""
    inner = layer.self_attn.q_proj
    layer.self_attn.q_proj = nn.Sequential(inner, nn.Linear(inner.out_features, inner.out_features))


CHANGES = {
    "in place": lambda layer: layer.self_attn.k_proj.weight.mul_(2),
    "adapter": exchange_module,
    "data": lambda layer: setattr(layer.self_attn.o_proj.weight, "data", 2 * layer.self_attn.o_proj.weight.data),
    "exchanged norm": lambda layer: setattr(layer, "post_attention_layernorm", nn.Identity()),
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


def test_gradients_compiling_and_other_attention_run_the_models_own_code():
    model = make_target("llama3.1").model
    tokens = torch.randint(VOCAB, (1, 9))
    expected = model(tokens).logits
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0
    model.get_decoder().set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model.get_decoder().layers[0], backend="eager")
        rope = tuple(torch.randn(2, 1, 3, 32))
        rows = torch.randn(1, 3, 48)
        torch.testing.assert_close(
            compiled(rows, position_embeddings=rope), model.get_decoder().layers[0](rows, position_embeddings=rope)
        )


@pytest.mark.parametrize(("error", "is_fused"), [(0.0, True), (0.03, False), (float("nan"), False)])
def test_layers_that_round_otherwise_are_fused_and_wrong_ones_are_not(error, is_fused, monkeypatch):
    """In bf16 with outputs of some hundreds, and with norms that round once, as on a GPU."""

    def norm(self, rows, index):
        return torch.rms_norm(rows, self.norms[index].shape, self.norms[index], self.epsilon) * (1 + error)

    monkeypatch.setattr("dpace.fast.fusion.FusedProducts.norm", norm)
    model = make_model("llama3.1", torch.bfloat16)
    if not any(type(module) is PackedLinear for module in model.modules()):
        pytest.skip("this CPU does not multiply bf16")
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.weight.data *= 1e4
    assert fuse_layers(model) is is_fused


def test_other_models_are_left_as_they_are():
    assert not fuse_layers(make_target("gemma2").model)
    unpacked = AutoModelForCausalLM.from_config(KNOWN["qwen3"]())
    assert not fuse_layers(unpacked)
    changed = make_model("qwen3")
    first = changed.get_decoder().layers[0]
    kind = types.new_class("Qwen3DecoderLayer", (type(first),))  # by its name only
    kind.forward = lambda self, *args, **kwargs: 2 * super(kind, self).forward(*args, **kwargs)
    for layer in changed.get_decoder().layers:
        layer.__class__ = kind
    expected = run(changed)
    assert not fuse_layers(changed)
    torch.testing.assert_close(run(changed), expected)
    assert type(first.mlp.up_proj) is PackedLinear and first.mlp.up_proj.fast.product is not None
