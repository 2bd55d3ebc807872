"""Greedy text equals `model.generate` on every family, with drafts that are sometimes right, or is refused."""

from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    RwkvConfig,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from dpace.config import RespondConfig
from dpace.decode import custom_generate, generate, generate_batch, generate_plain
from dpace.fast.cache import TextCache
from dpace.respond.in_process import generate_responses
from dpace.target import Target
from tests.support.cases import wide
from tests.support.families import (
    ALWAYS,
    CONFIGS,
    MORE,
    NOT_BATCHED,
    NOT_DRAFTED_FOR,
    VOCAB,
    make_sharp_target,
)
from tests.support.models import Oracle, make_drafter

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
LENGTH = 20
SHARED = [(7 * i) % 59 + 4 for i in range(20)]
"""A beginning of several prompts, longer than the windows."""


@pytest.fixture(params=wide(CONFIGS, "llama", "gemma3", "qwen3.5"), scope="module")
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def target(family):
    return make_sharp_target(family)


def own_text(target, prompt: list[int]) -> list[int]:
    """The target's greedy text by transformers' own `generate`, made once for each prompt."""
    return _own_text(target, tuple(prompt))


@cache
def _own_text(target, prompt: tuple[int, ...]) -> list[int]:
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None}
    return target.model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def assert_answers(target, prompts):
    """Those of one batch are the target's own texts."""
    answers = generate_responses(target, prompts, RespondConfig(max_new_tokens=LENGTH), range(len(prompts)))
    assert answers == [own_text(target, prompt) for prompt in prompts]


def decode_with_faults(target, prompt, text, every, width="full") -> int:
    """Decode a text by drafts of which every so many tokens one is wrong; give how many were accepted."""
    with pytest.MonkeyPatch.context() as patch:
        drafter = make_drafter(target, block_size=5, target_layer_ids=[0, 2])
        Oracle(patch, drafter, target, prompt + text, lambda n: n % every == every - 1)
        out = generate(target, drafter, prompt, max_new_tokens=len(text), width=width)
    assert out.token_ids == text
    return sum(out.accepted_lengths)


def test_plain_and_drafted_text_is_the_targets(family, target):
    """Drafts that are right, wrong, and wrong in between; prompts shorter and longer than the windows.

    Of drafts that are right, width `auto` chooses how much is verified, which may be nothing on a busy machine.
    """
    accepted = 0
    for prompt, everies in (([5, 9, 12, 7, 30], (3,)), (SHARED, (1, 3, 100))):
        text = own_text(target, prompt)
        assert len(set(text)) > 3, "a text that repeats itself shows nothing"
        assert generate_plain(target, prompt, max_new_tokens=LENGTH).token_ids == text
        assert generate(target, None, prompt, max_new_tokens=LENGTH).token_ids == text
        if family in NOT_DRAFTED_FOR:
            with pytest.raises(ValueError, match=NOT_DRAFTED_FOR[family]):
                make_drafter(target, target_layer_ids=[0, 2])
            continue
        for every in everies:
            if every == 100:
                decode_with_faults(target, prompt, text, every, "auto")
            else:
                accepted += decode_with_faults(target, prompt, text, every)
    assert family in NOT_DRAFTED_FOR or accepted > 10


def test_plain_decoding_keeps_the_window_only(target, monkeypatch):
    """And not the whole text, which would make the baseline slow."""
    caches = []
    monkeypatch.setattr("dpace.decode.loop.TextCache", lambda *args: caches.append(TextCache(*args)) or caches[0])
    generate_plain(target, SHARED, max_new_tokens=LENGTH)
    windows = [layer for layer in caches[0].layers if isinstance(layer, DynamicSlidingWindowLayer)]
    assert all(layer.keys.shape[2] <= layer.sliding_window for layer in windows)


def test_batches_keep_the_text_or_are_refused(family, target):
    prompts = [SHARED, SHARED[:7], [5, 9, 12]]
    drafter = None if family in NOT_DRAFTED_FOR else make_drafter(target, block_size=4, target_layer_ids=[0, 2])
    if family in NOT_BATCHED or family in NOT_DRAFTED_FOR:
        with pytest.raises(ValueError, match="full attention"):
            generate_batch(target, drafter, prompts, max_new_tokens=LENGTH)
        return
    found = generate_batch(target, drafter, prompts, max_new_tokens=LENGTH)
    assert [out.token_ids for out in found] == [own_text(target, prompt) for prompt in prompts]


def test_answers_are_the_targets_own(target):
    """In one batch, of different lengths, with a beginning that all share and without."""
    assert_answers(target, [[*SHARED, *rest] for rest in ([5], [9, 12, 7, 30], [40, 41])])
    assert_answers(target, [[5, 9], SHARED, [12] * 9])


def test_drawn_answers_of_padded_rows_are_those_of_their_seeds():
    target, prompts = make_sharp_target("gemma3"), {3: [5, 9], 4: SHARED}
    options = {"max_new_tokens": 9, "temperature": 1.5}
    answers = generate_responses(target, list(prompts.values()), RespondConfig(**options), list(prompts))
    assert answers == [generate_plain(target, ids, seed=seed, **options).token_ids for seed, ids in prompts.items()]


def test_features_do_not_depend_on_what_is_read_together(target):
    prompts = torch.tensor([[*SHARED, 5, 9], [*SHARED, 12, 7], [*SHARED, 40, 41]])
    together = target.read_features(prompts, [0, 2], with_head_input=True)
    alone = [target.read_features(prompt[None], [0, 2], with_head_input=True) for prompt in prompts]
    for found, rows in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(rows), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in MORE]
)
def test_experts_and_vision_language_models_keep_their_text(name):
    """Drafts of which every third token is wrong, behind a text longer than the windows."""
    target = make_sharp_target(name)
    text = own_text(target, SHARED)[:16]
    assert len(set(text)) > 3, "a text that repeats itself shows nothing"
    assert decode_with_faults(target, SHARED, text, every=3) > 5


SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 4}


def test_a_config_without_sizes_that_others_have_gets_a_drafter():
    config = FalconConfig(**SMALL, num_attention_heads=4, eos_token_id=1, bos_token_id=2)
    target = Target(AutoModelForCausalLM.from_config(config))
    drafter = make_drafter(target, target_layer_ids=[0, 2])
    assert drafter.spec.intermediate_size == 192
    plain = generate_plain(target, [4, 9], max_new_tokens=8)
    assert generate(target, drafter, [4, 9], max_new_tokens=8).token_ids == plain.token_ids


REFUSED = [
    (Llama4TextConfig, {"num_local_experts": 2, "intermediate_size_mlp": 64}, "has 0 lists of 4 decoder layers"),
    (RwkvConfig, {"attention_hidden_size": 48}, "keeps nothing in transformers' cache"),
    (GPT2Config, {"num_attention_heads": 2}, "more than a scaled table"),  # learned positions
    (LlamaConfig, {"num_attention_heads": 2, "num_hidden_layers": 0}, "has 1 lists of 0 decoder layers"),
]


@pytest.mark.parametrize(("kind", "sizes", "reason"), REFUSED)
def test_other_models_are_refused(kind, sizes, reason):
    with pytest.raises(ValueError, match=reason):
        Target(AutoModelForCausalLM.from_config(kind(**{**SMALL, **sizes})))


def test_longrope_is_followed_on_either_side_and_refused_across():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    target = make_sharp_target("phi3", **changes)
    drafter = make_drafter(target, block_size=4, target_layer_ids=[0, 2])
    for prompt, length in ((SHARED[:12], LENGTH), (SHARED + SHARED, LENGTH)):
        text = own_text(target, prompt)[:length]
        assert generate(target, drafter, prompt, max_new_tokens=length, width="full").token_ids == text
    with pytest.raises(ValueError, match="33 tokens; past 32 .* ask for fewer"):
        generate_plain(target, SHARED, max_new_tokens=13)
    decode = custom_generate(target, drafter)
    with pytest.raises(ValueError, match="33 tokens; past 32 .* ask for fewer"):
        target.model.generate(torch.tensor([SHARED]), custom_generate=decode, max_new_tokens=13)
    with pytest.raises(ValueError, match="one prompt at a time"):
        generate_batch(target, drafter, [SHARED[:5], SHARED + SHARED], max_new_tokens=5)
    with pytest.raises(ValueError, match="--train.max-length 32"):
        target.features(torch.tensor([SHARED + SHARED] * 2), [0, 2])


@pytest.mark.parametrize("part", ["layers.1", "lm_head", "embed_tokens", "norm"])
@torch.no_grad()
def test_weights_that_are_changed_in_place_are_seen(part):
    """Fused layers, packed layers and the head read the new ones."""
    target = make_sharp_target("llama")
    before = generate_plain(target, SHARED, max_new_tokens=LENGTH).token_ids
    for name, weight in target.model.named_parameters():
        if part in name:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    found = generate_plain(target, SHARED, max_new_tokens=LENGTH).token_ids
    fresh = AutoModelForCausalLM.from_config(target.model.config).eval()
    fresh.load_state_dict(target.model.state_dict())
    assert found == own_text(Target(fresh), SHARED) != before


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_answers_do_not_depend_on_the_length_of_others(kind):
    """Where the longest text of a batch would choose the rotation of all."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, **factors}
    family, boundary = ("phi3", "original_") if kind == "longrope" else ("llama", "")
    target = make_sharp_target(family, rope_parameters=rope, **{f"{boundary}max_position_embeddings": 32})
    assert_answers(target, [SHARED, [5, 9, 3], SHARED + SHARED, [5, 9]])
