"""The network, the files of a drafter, and which drafters are refused."""

import itertools
import random
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache

from dpace.blocks import build_blocks
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.drafter import choose_mask_token
from dpace.drafter.spec import SCALES, DrafterSpec
from dpace.drafter.views import blocks_hidden
from dpace.modeling_dflash import DFlashConvolution, _small_tiles
from tests.support.files import change_config, read_json
from tests.support.models import MASK, make_drafter, make_target, make_tokenizer


@pytest.fixture
def target():
    return make_target("qwen3")


def hidden_of_blocks(drafter, target, token_ids, features, *anchors, model=None):
    """The training view: all blocks of each text at once."""
    is_response = torch.ones_like(token_ids) > 0
    blocks = build_blocks(token_ids, is_response, [torch.tensor(own) for own in anchors], drafter.block_size)
    inputs = {"token_ids": token_ids, "features": features, **vars(blocks)}
    return blocks_hidden(drafter, target, inputs, model=model).hidden


@pytest.mark.parametrize(("family", "weight"), [("qwen3", 7.23), ("gemma2", 6.23)])
def test_auto_follows_from_the_target(family, weight):
    """Gemma stores its factors minus 1."""
    target = make_target(family)
    target.decoder.norm.weight.fill_(weight)
    drafter = make_drafter(target, norm_scale="auto", intermediate_size="auto")
    assert drafter.norm.weight.unique().item() == pytest.approx(0.72) and drafter.spec.intermediate_size == 32


@torch.no_grad()
def test_no_leak_from_the_anchor_on_or_from_other_blocks(random_target):
    drafter = make_drafter(random_target)
    token_ids = torch.randint(4, 64, (1, 24))
    features = random_target.features(token_ids, drafter.target_layer_ids)
    (before,) = hidden_of_blocks(drafter, random_target, token_ids, features, [8, 10, 20])
    (alone,) = hidden_of_blocks(drafter, random_target, token_ids, features, [10])
    torch.testing.assert_close(alone[0], before[1], rtol=1e-4, atol=1e-5)
    token_ids[0, 9:] = torch.randint(4, 64, (15,))
    features[0, 8:] += 1
    (after,) = hidden_of_blocks(drafter, random_target, token_ids, features, [8, 10, 20])
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


@pytest.mark.wide
def test_compiled_training_makes_few_graphs(target):
    """Batches of any length, the last and smaller one of an epoch among them: at most three graphs."""
    drafter = make_drafter(target).train()
    counter = CompileCounter()
    compiled = torch.compile(drafter, backend=counter)
    rng = random.Random(0)
    for number in range(30):
        batch, length, count = 1 if number % 7 == 6 else 2, rng.randint(30, 90), rng.randint(9, 20)
        token_ids = torch.zeros(batch, length, dtype=torch.long)
        anchors = [sorted(rng.sample(range(length - 1), count)) for _ in range(batch)]
        features = torch.randn(batch, length, len(drafter.target_layer_ids) * target.hidden_size)
        hidden_of_blocks(drafter, target, token_ids, features, *anchors, model=compiled).sum().backward()
    assert 1 <= counter.frame_count <= 3


def test_bf16_autocast_trains_fp32_weights(target):
    """What a GPU run does, on the CPU."""
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


def test_reload_gives_equal_weights_and_the_published_layout(random_target, tmp_path):
    drafter = make_drafter(random_target)
    drafter.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    nested = {"mask_token_id": MASK, "target_layer_ids": drafter.target_layer_ids}
    nested |= {name: config[name] for name in SCALES if name in config}
    assert config["architectures"] == ["DFlashDraftModel"] and config["dflash_config"] == nested
    assert config.items() >= nested.items()
    assert {"block_size", "num_target_layers", "rope_parameters", "rope_theta"} <= set(config)
    change_config(tmp_path, _attn_implementation="someone/kernel")  # transformers would download it and run it
    for again in (Drafter.from_pretrained(tmp_path), load_drafter(tmp_path, random_target)):
        assert again.spec == drafter.spec and again.config._attn_implementation == "sdpa"
        torch.testing.assert_close(again.state_dict(), drafter.state_dict(), rtol=0, atol=0)


def test_the_config_is_read_once_and_again_where_it_has_changed(target, monkeypatch):
    drafter = make_drafter(target)
    read = Mock(side_effect=DrafterSpec.from_values)
    monkeypatch.setattr(DrafterSpec, "from_values", read)
    for size in (4, 4, 6, 6, 4):
        drafter.config.block_size = size
        assert drafter.spec.block_size == size
    drafter.config.dflash_config["sample_from_anchor"] = True
    assert drafter.spec.num_draft_tokens == 4 and read.call_count <= 4


def test_a_drafter_rotates_as_its_target():
    target = make_target("llama3.1")
    expected = target.model.config.rope_parameters
    assert make_drafter(target).config.rope_parameters == expected and expected["rope_theta"] == 500_000


def test_a_narrow_mlp_changes_nothing_else(target):
    narrow = make_drafter(target, intermediate_size=24)
    shapes = {name: weight.shape for name, weight in make_drafter(target).named_parameters()}
    changed = {name for name, weight in narrow.named_parameters() if weight.shape != shapes[name]}
    assert narrow.layers[0].mlp.down_proj.weight.shape == (target.hidden_size, 24)
    assert changed == {f"layers.{i}.mlp.{name}_proj.weight" for i in (0, 1) for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target_layer_ids": [1, 5]}, r"ascending ids in 0 \.\. 4"),
        ({"target_layer_ids": [3, 1]}, r"ascending ids in 0 \.\. 4"),
        ({"target_layer_ids": [0, 4], "mask_token_id": 64}, "outside the target's embedding"),
        ({"sliding_window": 4}, "longer than a block"),
        ({"full_layers": (0,)}, r"layers 0 \.\. 1, together with sliding_window"),
        ({"full_layers": (0, 1), "sliding_window": 9}, "some, not all"),
        ({"full_layers": (2,), "sliding_window": 9}, "some, not all"),
    ],
)
def test_what_no_engine_can_serve_is_refused(changes, reason, target):
    with pytest.raises(ValueError, match=reason):
        make_drafter(target, **changes)


def test_the_mask_token_is_one_that_no_text_contains(target):
    """A reserved one; better a row of the embedding that no token has."""
    target.tokenizer = make_tokenizer()
    assert choose_mask_token(target) == MASK
    uses = {0: "padding", 1: "ends", 2: "begins or ends", 10: "ordinary text"}
    for token_id, use in uses.items():
        with pytest.raises(ValueError, match=use):
            make_drafter(target, mask_token_id=token_id)
    larger = make_target("qwen3", vocab_size=70)
    larger.tokenizer = target.tokenizer
    assert choose_mask_token(larger) == 64
    make_drafter(larger, mask_token_id=64)
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
        for i, c, tap in itertools.product(range(6), range(4), range(2)):
            if i % 3 >= tap:
                out[i, c] += (base[side, tap, c] + added[i, side, tap, c // 2]) * x[i - tap, c]
        return out

    found = convolution(rows, torch.tanh)
    torch.testing.assert_close(found[0], by_hand(by_hand(rows[0], 0).tanh(), 1))
    torch.testing.assert_close(convolution(rows[:, :2], torch.tanh), found[:, :2])  # the beginning of a block


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


def test_a_cache_has_two_names(language_drafter):
    """transformers before 5.24 gives it as `past_key_values`."""
    inputs = torch.randn(1, 2, 48), torch.randn(1, 3, language_drafter.fc.in_features), torch.arange(5)[None]
    caches = {name: DynamicCache() for name in ("cache", "past_key_values")}
    for name, cache in caches.items():
        language_drafter(*inputs, **{name: cache})
    keys = [cache.layers[0].keys for cache in caches.values()]
    assert keys[0].shape[2] == 5 and keys[0].equal(keys[1])
