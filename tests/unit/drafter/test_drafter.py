import inspect
import random
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache

from dpace.blocks import build_blocks, dense_mask
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.mask_token import check_mask_token, choose_mask_token
from dpace.drafter.views import blocks_hidden
from dpace.modeling_dflash import DFlashAttention, DFlashConvolution, DFlashDraftModel, DFlashLayer, _small_tiles
from tests.conftest import MASK, make_drafter, make_target, make_tokenizer, make_with_convolutions
from tests.support.files import change_config, read_json


def hidden_of_blocks(drafter, target, token_ids, features, anchors):
    """The training view: all blocks at once."""
    is_response = torch.ones_like(token_ids, dtype=torch.bool)
    blocks = build_blocks(token_ids, is_response, [torch.tensor(anchors)], drafter.block_size)
    num_context = token_ids.shape[1]
    positions = torch.cat([torch.arange(num_context)[None], blocks.position_ids.flatten(1)], dim=1)
    hidden = drafter(
        noise_embeds=target.embed(blocks.input_ids(drafter.mask_token_id)).flatten(1, 2),
        context_hidden_states=features,
        position_ids=positions,
        attention_mask=dense_mask(blocks, num_context),
    ).last_hidden_state
    return hidden.unflatten(1, blocks.labels.shape[1:])[0]


@pytest.mark.parametrize("make", [make_drafter, make_with_convolutions])
@torch.no_grad()
def test_training_view_equals_cached_view(make, random_target):
    drafter = make(random_target)
    token_ids = torch.randint(4, 64, (1, 24))
    features = random_target.features(token_ids, drafter.target_layer_ids)
    anchors = [5, 6, 9, 15, 23]
    training = hidden_of_blocks(drafter, random_target, token_ids, features, anchors)
    cache, seen = DynamicCache(config=drafter.config), 0
    for expected, anchor in zip(training, anchors, strict=True):
        block = torch.full((1, drafter.block_size), MASK)
        block[0, 0] = token_ids[0, anchor]
        cached = drafter(
            noise_embeds=random_target.embed(block),
            context_hidden_states=features[:, seen:anchor],
            position_ids=torch.arange(seen, anchor + drafter.block_size)[None],
            cache=cache,
        ).last_hidden_state[0]
        cache.crop(-drafter.block_size)
        seen = anchor
        torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_leak_from_the_anchor_on_or_from_other_blocks(random_target):
    drafter = make_drafter(random_target)
    token_ids = torch.randint(4, 64, (1, 24))
    features = random_target.features(token_ids, drafter.target_layer_ids)
    before = hidden_of_blocks(drafter, random_target, token_ids, features, [8, 10, 20])
    changed = token_ids.clone()
    changed[0, 9:] = torch.randint(4, 64, (15,))
    changed_features = features.clone()
    changed_features[0, 8:] += 1
    after = hidden_of_blocks(drafter, random_target, changed, changed_features, [8, 10, 20])
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])
    alone = hidden_of_blocks(drafter, random_target, token_ids, features, [10])
    torch.testing.assert_close(alone[0], before[1], rtol=1e-4, atol=1e-5)


@pytest.mark.wide
def test_compiled_training_makes_few_graphs(monkeypatch):
    """Batches of any length, the last and smaller one of an epoch among them: at most three graphs."""
    for kind in (DFlashDraftModel, DFlashLayer, DFlashAttention):  # without the checks of types
        monkeypatch.setattr(kind, "forward", inspect.unwrap(kind.forward))
    target = make_target("qwen3")
    drafter = make_drafter(target).train()
    counter = CompileCounter()
    compiled = torch.compile(drafter, backend=counter)
    rng = random.Random(0)
    for number in range(30):
        batch, length, count = 1 if number % 7 == 6 else 2, rng.randint(30, 90), rng.randint(9, 20)
        token_ids = torch.zeros(batch, length, dtype=torch.long)
        anchors = [torch.tensor(sorted(rng.sample(range(length - 1), count))) for _ in range(batch)]
        blocks = build_blocks(token_ids, token_ids == 0, anchors, drafter.block_size)
        features = torch.randn(batch, length, len(drafter.target_layer_ids) * target.hidden_size)
        inputs = {"token_ids": token_ids, "features": features, **vars(blocks)}
        hidden = blocks_hidden(drafter, target, inputs, model=compiled).hidden
        hidden.sum().backward()
    assert 1 <= counter.frame_count <= 3


def test_bf16_autocast_trains_fp32_weights():
    """What a GPU run does, on the CPU."""
    target = make_target("qwen3")
    target.model.bfloat16()
    drafter = make_drafter(target).train()
    token_ids = torch.randint(4, 64, (1, 24))
    features = target.features(token_ids, drafter.target_layer_ids)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_of_blocks(drafter, target, token_ids, features, [5, 9])
    exact = hidden_of_blocks(drafter, target, token_ids, features, [5, 9])
    assert (hidden - exact).norm() / exact.norm() < 0.03
    hidden.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in drafter.parameters())


@torch.no_grad()
def test_reload_gives_equal_hidden_states_and_the_published_layout(random_target, tmp_path):
    drafter = make_drafter(random_target)
    drafter.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["dflash_config"] == {"mask_token_id": MASK, "target_layer_ids": drafter.target_layer_ids}
    assert {"block_size", "num_target_layers", "rope_parameters", "rope_theta"} <= set(config)
    assert config["mask_token_id"] == MASK and config["target_layer_ids"] == drafter.target_layer_ids
    names = set(drafter.state_dict())
    layer = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"self_attn.{n}_norm" for n in "qk"}
    layer |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"}
    expected = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert names == expected | {f"layers.{i}.{n}.weight" for i in range(2) for n in layer}
    again = Drafter.from_pretrained(tmp_path).eval()
    token_ids = torch.randint(4, 64, (1, 12))
    features = random_target.features(token_ids, drafter.target_layer_ids)
    views = [hidden_of_blocks(d, random_target, token_ids, features, [4, 7]) for d in (drafter, again)]
    assert torch.equal(*views)


def test_a_config_does_not_choose_the_attention(language_target, tmp_path):
    """transformers would download such a kernel and run it."""
    make_drafter(language_target).save_pretrained(tmp_path)
    change_config(tmp_path, _attn_implementation="someone/kernel")
    for drafter in (load_drafter(tmp_path, language_target), Drafter.from_pretrained(tmp_path)):
        assert drafter.config._attn_implementation == "sdpa"


def test_a_drafter_for_another_target_is_refused():
    drafter = make_drafter(make_target("qwen3"))
    with pytest.raises(ValueError, match="num_target_layers is 6"):
        drafter.check_target(make_target("qwen3", num_hidden_layers=8, layer_types=["full_attention"] * 8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_layer_ids": [1, 5]}, "output of layer 5 is normalized"),
        ({"target_layer_ids": [3, 1]}, "expected numbers in ascending order"),
        ({"target_layer_ids": [-1, 2]}, "greater than or equal to 0"),
        ({"block_size": 1}, "greater than or equal to 2"),
        ({"mask_token_id": 64}, "outside the target's embedding"),
    ],
)
def test_what_no_engine_can_serve_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        make_drafter(make_target("qwen3"), **changes)


def test_mask_token_is_a_reserved_one():
    target = make_target("qwen3")
    target.tokenizer = make_tokenizer()
    assert choose_mask_token(target) == MASK
    for token_id, reason in [
        (0, "padding"),
        (1, "ends"),
        (10, "ordinary text"),
        (64, "outside"),
        (2, "begins or ends"),
    ]:
        with pytest.raises(ValueError, match=reason):
            check_mask_token(token_id, target)


def test_an_unused_row_is_preferred_and_none_free_is_said():
    target = make_target("qwen3", vocab_size=70)
    target.tokenizer = make_tokenizer()
    assert choose_mask_token(target) == 64
    target = make_target("qwen3")
    target.tokenizer = make_tokenizer()
    target.tokenizer.chat_template += "<|reserved_0|>"
    with pytest.raises(ValueError, match="no token of"):
        choose_mask_token(target)


def test_a_convolution_is_what_its_formula_says():
    """Two blocks of three slots, four channels in two groups, written out by hand."""
    config = SimpleNamespace(hidden_size=4, block_size=3, dflash_config={"conv_kernel_size": 2, "conv_group_size": 2})
    convolution = DFlashConvolution(config)
    base, projection = torch.randn(2, 2, 4), torch.randn(8, 4)
    convolution.load_state_dict({"base_kernel": base, "kernel_projection.weight": projection})
    rows = torch.randn(1, 6, 4)
    added = (rows @ projection.T).view(6, 2, 2, 2)  # slot, side, tap, group

    def by_hand(x, side):
        out = torch.zeros(6, 4)
        for i in range(6):
            for c in range(4):
                for tap in range(2):
                    if i % 3 >= tap:
                        out[i, c] += (base[side, tap, c] + added[i, side, tap, c // 2]) * x[i - tap, c]
        return out

    found = convolution(rows, lambda x: x.tanh())
    torch.testing.assert_close(found[0], by_hand(by_hand(rows[0], 0).tanh(), 1))
    part = convolution(rows[:, :2], lambda x: x.tanh())  # the beginning of a block
    torch.testing.assert_close(part, found[:, :2])
    of_two = torch.cat([convolution(block, lambda x: x.tanh()) for block in rows.split(2, dim=1)], dim=1)
    torch.testing.assert_close(convolution(rows, lambda x: x.tanh(), 2), of_two)  # three blocks of two slots


@torch.no_grad()
def test_convolutions_start_as_nothing(random_target):
    drafter = make_drafter(random_target, conv_kernel_size=2)
    plain = make_drafter(random_target)
    plain.load_state_dict({name: drafter.state_dict()[name] for name in plain.state_dict()})
    inputs = torch.randn(2, 4, 48), torch.randn(2, 3, 96), torch.arange(7)[None]
    torch.testing.assert_close(drafter(*inputs), plain(*inputs))


@pytest.mark.parametrize(
    ("shared_bytes", "head_dim", "is_small"), [(101_376, 128, 1), (101_376, 64, 0), (232_448, 128, 0)]
)
def test_tiles_are_small_where_heads_are_wide_and_shared_memory_is_small(shared_bytes, head_dim, is_small, monkeypatch):
    """That of an RTX 4090 and of an H100."""
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _small_tiles.cache_clear()
    assert bool(_small_tiles(torch.device("cuda", 7), head_dim)) == is_small
