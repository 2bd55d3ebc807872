"""What only a GPU can show: `python benchmarks/gpu.py` runs it first."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpace import modeling_dflash
from dpace.blocks import build_blocks
from dpace.config import LossConfig
from dpace.decode import Decoder, Paces, generate, generate_batch, generate_plain
from dpace.decode.generation import read_clock
from dpace.drafter import load_drafter
from dpace.drafter.views import blocks_hidden
from dpace.fast.speed_up import speed_up
from dpace.loss import frozen_head_nll
from dpace.loss.objective import make_weigh
from dpace.system.device import TILED
from dpace.target import Target
from dpace.target.head import LmHead
from dpace.training.loop import TrainingLoop
from dpace.training.run import choose_conversations, keep_features
from tests.support.losses import frozen_head_nll_reference
from tests.support.models import FAMILIES, LANGUAGE_RECIPE, make_drafter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of torch.compile
    pytest.mark.usefixtures("unchecked_types"),
]
GPU = torch.device("cuda")
drawn_and_not = pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])


@pytest.fixture
def pair(language_folder, language_drafter_folder):
    """A target and its drafter on the GPU, in fp32, where texts are equal token for token."""
    target = Target.load(str(language_folder), dtype=torch.float32)
    assert target.device.type == "cuda" and all(layer.fast for layer in target.layers)
    return target, load_drafter(language_drafter_folder, target)


def gpu_target(dtype, **changes):
    """A random target that is made on the GPU, so that nothing of it was made for a CPU."""
    config = FAMILIES["qwen3"]()
    for name, value in changes.items():
        setattr(config, name, value)
    with GPU:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    speed_up(model)
    return Target(model)


@pytest.mark.parametrize(("block_size", "head_dim"), [(4, 16), (16, 16), (10, 16), (16, 128), (16, 256)])
def test_the_mask_of_tiles_trains_as_the_dense_one(block_size, head_dim, monkeypatch):
    """Hidden states and every gradient, for several tiles of queries, padding blocks and an uneven context.

    Wide heads with the tiles that cards with little shared memory take, whatever card this is.
    """
    monkeypatch.setattr(modeling_dflash, "SMALL_SHARED_MEMORY", 2**30)
    modeling_dflash._small_tiles.cache_clear()
    target = gpu_target(torch.float32, max_position_embeddings=512, head_dim=head_dim)
    drafter = make_drafter(target, block_size=block_size).train()
    ids = torch.randint(4, 64, (2, 301), device=GPU)
    blocks = build_blocks(ids, ids > 0, [torch.arange(0, 300, 7), torch.arange(5, 200, 31)], block_size)
    features = torch.randn(2, 301, len(drafter.target_layer_ids) * target.hidden_size, device=GPU)
    found = []
    for tiled_devices in ((), TILED):
        monkeypatch.setattr("dpace.drafter.views.TILED", tiled_devices)
        drafter.zero_grad()
        out = blocks_hidden(drafter, target, {**vars(blocks), "token_ids": ids, "features": features})
        hidden = out.hidden[blocks.is_block]
        hidden.square().sum().backward()
        found.append([hidden, *(parameter.grad for parameter in drafter.parameters())])
    for dense, tiled in zip(*found, strict=True):
        assert float((tiled - dense).norm() / dense.norm()) < 1e-4


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_tile_of_the_loss_equals_the_reference(dtype, softcap):
    """Loss and gradient, in many tiles; in bf16 the error is no larger than that of all logits at once in bf16."""
    generator = torch.Generator(GPU).manual_seed(0)
    states = torch.randn(2, 40, 8, 128, device=GPU, generator=generator)
    weight = torch.randn(5000, 128, device=GPU, generator=generator) / 8
    labels = torch.randint(5000, (2, 40, 8), device=GPU, generator=generator)
    is_scored = torch.rand(2, 40, 8, device=GPU, generator=generator) < 0.8
    is_scored[..., 0] = False
    weigh = make_weigh(LossConfig(), block_size=8)

    def run(function, kind, **options):
        rows = states.to(kind).clone().requires_grad_()
        out = function(rows, LmHead(weight.to(kind), 0.5, softcap), labels, is_scored, weigh=weigh, **options)
        loss = out.losses.sum()
        loss.backward()
        assert rows.grad is not None
        return loss.detach(), rows.grad.float()

    exact = run(frozen_head_nll_reference, torch.float32)
    naive = run(frozen_head_nll_reference, dtype)
    ours = run(frozen_head_nll, dtype, chunk_bytes=2**18)
    for value, bound, truth in zip(ours, naive, exact, strict=True):
        error, allowed = (float((x - truth).norm() / truth.norm()) for x in (value, bound))
        assert error <= 1.1 * allowed + 1e-5


@drawn_and_not
def test_text_is_that_of_plain_decoding(pair, questions, options):
    """In fp32, for every verification length; greedy text is that of transformers, too."""
    target, drafter = pair
    paces = Paces()
    for row in questions[:6]:
        plain = generate_plain(target, row, max_new_tokens=24, **options).token_ids
        for width in ("full", "auto", 3):
            found = generate(target, drafter, row, width=width, paces=paces, max_new_tokens=24, **options)
            assert found.token_ids == plain
        if not options:
            inputs = torch.tensor([row], device=GPU)
            theirs = target.model.generate(inputs, do_sample=False, max_new_tokens=24)[0, len(row) :]
            assert theirs.tolist() == plain


@pytest.mark.parametrize("is_drafted", [True, False])
def test_compiled_steps_are_compiled_once(pair, questions, is_drafted):
    """Eight calls after the first two recompile nothing, replay CUDA graphs, and give the text of plain decoding."""
    from torch._dynamo.utils import counters

    target, drafter = pair
    decoder = Decoder(target, drafter if is_drafted else None, compile=True)
    for row in questions[:2]:
        decoder.generate(row, max_new_tokens=24)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [decoder.generate(row, max_new_tokens=24).token_ids for row in questions[2:]]
    assert found == [generate_plain(target, row, max_new_tokens=24).token_ids for row in questions[2:]]
    assert not counters["stats"]["unique_graphs"] and not counters["inductor"]["cudagraph_skips"]


def test_verifying_behind_a_long_text_shares_its_keys(monkeypatch):
    """In bf16, one row of 8 tokens behind 16,000: the results of the mask of numbers, in less time."""
    from dpace.fast.cache import TextCache

    target = gpu_target(torch.bfloat16, hidden_size=1024, head_dim=128, max_position_embeddings=2**15)
    ids = torch.randint(4, 64, (1, 16_008), device=GPU)
    cache = TextCache(target.config, ids.shape[1])
    found, seconds = [], []
    with torch.inference_mode():
        target.hidden(ids[:, :16_000], cache)
        for has_kernel in (True, False):
            if not has_kernel:
                monkeypatch.setattr("dpace.fast.attention.has_causal_kernel", lambda rows: False)
            for number in range(30):
                if number == 10:
                    started = read_clock(GPU)
                found.append(target.hidden(ids[:, 16_000:], cache))
                cache.crop(-8)
            seconds.append(read_clock(GPU) - started)
    assert float((found[0] - found[-1]).float().norm() / found[-1].float().norm()) < 2e-2
    assert seconds[0] < seconds[1], seconds


@drawn_and_not
def test_compiled_drafts_give_the_text_of_plain_decoding(pair, questions, options):
    """A step's graph reads no result that an earlier graph has freed; one prompt and several, greedy and drawn."""
    target, drafter = pair
    rows = questions[:4]
    decoder = Decoder(target, drafter, compile=True, max_length=200)
    expected = [out.token_ids for out in generate_batch(target, drafter, rows, max_new_tokens=24, **options)]
    for _ in range(3):
        found = decoder.generate_batch(rows, max_new_tokens=24, **options)
        assert [out.token_ids for out in found] == expected
    assert decoder.generate(rows[0], max_new_tokens=24, **options).token_ids == expected[0]


def test_the_host_waits_once_in_a_training_step(language_responses):
    """With kept hidden states and two micro-batches; steps before it have compiled the kernels."""
    target = gpu_target(torch.bfloat16)
    recipe = replace(LANGUAGE_RECIPE, train=replace(LANGUAGE_RECIPE.train, gradient_accumulation_steps=2))
    datasets = choose_conversations(language_responses[:48], [], recipe)
    keep_features(target, *datasets, recipe)
    drafter = make_drafter(target, block_size=6, num_layers=2, num_features=2).float().train()
    weigh = make_weigh(recipe.loss, 6, lambda slots: slots.token_probs + 0.5)
    loop = TrainingLoop(drafter, target, *datasets, recipe, weigh=weigh, checkpoints=Path())
    waits = []
    for _, batches in zip(range(4), loop.batches_of_steps(), strict=False):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                loop.take_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(each.message) for each in found))
    assert waits[-1] == 1, waits
