"""`examples/one_page.py` and the library compute the same: the page is the reference that imports nothing of dpace."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpace import load_drafter
from dpace.blocks import build_blocks, build_target_layer_ids, dense_mask
from dpace.config import LossConfig
from dpace.decode import generate
from dpace.drafter.views import blocks_hidden
from dpace.loss.loss import block_loss, frozen_head_nll
from dpace.loss.objective import make_weigh
from dpace.metrics import Acceptance
from dpace.system.loading import read_config
from dpace.weights import dflash_gamma, dflash_weights
from examples import one_page
from tests.support.models import make_target

START = 12
"""Where the answer begins."""
ANCHORS = [12, 13, 20, 31, 36, 38]
"""Of a text of 40 tokens: neighbors, and blocks that run past its end."""


@pytest.fixture(scope="module", params=["llama3.1", "qwen3", "smollm2"])
def pair(request, tmp_path_factory):
    """A target as the page and as the library know it, the page's drafter, trained a little, and the same as read.

    Both have the weights that the page has written. It was trained on one text, which both decode.
    """
    torch.manual_seed(0)
    target = make_target(request.param)
    target.model.generation_config.eos_token_id = None  # no answer ends before its length
    model = target.model.requires_grad_(False)
    prompt = torch.randint(4, 60, (1, START))
    whole = model.generate(prompt, do_sample=False, max_new_tokens=28, attention_mask=torch.ones_like(prompt))
    text = whole[0].tolist()
    trained = one_page.Drafter(model, mask_token=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_page, "STEPS", 40)
        patch.setattr(one_page, "BATCH", 1)
        one_page.train(trained, model, [(text, START)])
    folder = tmp_path_factory.mktemp("page")
    one_page.save(trained, model, folder)
    read = load_drafter(folder, target).float()
    trained.load_state_dict(read.state_dict())
    return model, trained, target, read, text


def test_feature_layers():
    for num_layers in (6, 28, 30, 36):
        target = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=num_layers))
        assert one_page.feature_layers(target) == build_target_layer_ids(num_layers, 3)


def test_blocks_mask_loss_and_gradients(pair):
    model, trained, target, read, text = pair
    token_ids = torch.tensor([text])
    is_response = torch.arange(len(text))[None] >= START
    blocks = build_blocks(token_ids, is_response, [torch.tensor(ANCHORS)], one_page.BLOCK_SIZE)
    inputs, labels, is_scored, positions, mask = one_page.cut_blocks(text, ANCHORS, trained.mask_token)
    assert_close(blocks.input_ids(trained.mask_token)[0], inputs)
    assert_close(blocks.labels[0], labels)
    assert_close(blocks.is_scored[0], is_scored)
    assert_close(blocks.position_ids[0], positions)
    assert_close(dense_mask(blocks, len(text))[0, 0], mask)

    features = one_page.read(model, text)[1]
    assert_close(target.features(token_ids, read.target_layer_ids)[0], features)
    expected = one_page.draft_loss(trained, model, text, features, ANCHORS)
    expected.backward()
    read.train().requires_grad_(True)
    hidden = blocks_hidden(read, target, {"token_ids": token_ids, "features": features[None], **vars(blocks)}).hidden
    weigh = make_weigh(LossConfig(), one_page.BLOCK_SIZE)
    out = frozen_head_nll(hidden, target.head, blocks.labels, blocks.is_scored, weigh=weigh)
    loss, num_items = block_loss(out.losses, blocks.is_scored, out.weights, reduction="anchors")
    loss = loss / num_items
    loss.backward()
    assert_close(loss, expected)
    ours = {name: parameter.grad for name, parameter in read.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in trained.named_parameters()}
    assert ours.keys() == theirs.keys() and all(gradient.abs().max() > 0 for gradient in theirs.values())
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_text_and_accepted_lengths(pair):
    model, trained, target, read, text = pair
    found, accepted = one_page.generate(model, trained, text[:START], len(text) - START)
    ours = generate(target, read.eval(), text[:START], max_new_tokens=len(text) - START, width="full")
    assert found == text and ours.token_ids == text[START:]
    assert sum(accepted) > 0, "a drafter that was trained on this text drafts some of it"
    # The last pass may accept more than the text has room for; the library counts what it keeps.
    room = len(text) - START - 1 - sum(accepted[:-1]) - len(accepted[:-1])
    expected = Acceptance.from_lengths([*accepted[:-1], min(accepted[-1], room)], one_page.BLOCK_SIZE)
    assert ours.acceptance.histogram.tolist() == expected.histogram.tolist()


@pytest.fixture
def ordinary_folder(language_folder, tmp_path) -> Path:
    """The target of the tests, whose token 3 is an ordinary word, as in most vocabularies; token 61 is reserved."""
    folder = shutil.copytree(language_folder, tmp_path / "ordinary")
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts["model"]["vocab"] |= {"w55": 3, "<|reserved_0|>": 61}
    for token in facts["added_tokens"]:
        token["id"] = 61 if token["id"] == 3 else token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    return folder


def test_the_page_runs_and_bench_reads_its_drafter(
    ordinary_folder, language_prompts, run_line, tmp_path, monkeypatch, capsys
):
    for name, value in {"PROMPTS": language_prompts[:8], "STEPS": 2, "ANSWER_TOKENS": 12}.items():
        monkeypatch.setattr(one_page, name, value)
    output = tmp_path / "drafter"
    one_page.main(str(ordinary_folder), str(output))
    printed = capsys.readouterr().out
    assert re.search(r"^D-PACE: same text; \d+ passes gave \d\.\d\d tokens each", printed, re.MULTILINE)
    assert "fixed decay: same text; " in printed and read_config(output)["mask_token_id"] == 61
    options = "--num-prompts 1 --max-new-tokens 8 --temperatures 0 --widths full"
    run_line(f"bench --target {ordinary_folder} --drafters {output} --output {tmp_path / 'bench'} {options}")


def test_a_mask_token_is_unused_or_special(language_folder, ordinary_folder):
    tokenizer = AutoTokenizer.from_pretrained(ordinary_folder)
    target = AutoModelForCausalLM.from_pretrained(ordinary_folder)
    assert one_page.choose_mask_token(tokenizer, target) == 61
    target.generation_config.eos_token_id = [1, 61]
    with pytest.raises(ValueError, match="no special token is free"):
        one_page.choose_mask_token(tokenizer, target)
    target.config.vocab_size = len(tokenizer) + 1
    assert one_page.choose_mask_token(tokenizer, target) == len(tokenizer)


def test_the_fixed_decay_is_the_librarys():
    is_scored = torch.arange(one_page.BLOCK_SIZE)[None, None] > 0
    decay = one_page.decay_weights(is_scored.float(), is_scored)
    assert_close(decay, dflash_weights(is_scored, dflash_gamma(one_page.BLOCK_SIZE)))


def test_the_page_is_one_page():
    text = Path(one_page.__file__).read_text()
    assert len(text.splitlines()) <= 290 and not re.search(r"^\s*(import|from) dpace", text, re.MULTILINE)
