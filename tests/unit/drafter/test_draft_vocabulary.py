"""Drafts of some tokens only: the text, what is drafted, what is measured, and when it is used."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList

from dpace.batches.dataset import ResponseDataset
from dpace.decode import generate, generate_batch, generate_plain
from dpace.decode.generation import Continuation
from dpace.decode.loop import Speculation
from dpace.decode.sampling import Sampler
from dpace.drafter import load_drafter
from dpace.drafter.vocabulary import VOCABULARY_FILE, DraftVocabulary, PackedRows, load_vocabulary
from dpace.train.finish import measure_and_calibrate
from tests.conftest import LANGUAGE_RECIPE, make_target
from tests.support.files import read_json
from tests.unit.train.test_train import run_recipe, short


@pytest.fixture
def drafter(language_drafter):
    """A copy that may draft a part of the tokens."""
    return copy.deepcopy(language_drafter)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_head_with_all_other_tokens_left_out(family, dtype):
    """With the prompt's tokens, caps and scales; and again after the head has changed."""
    target = make_target(family)
    target.model.to(dtype)
    target.head = target.head._replace(weight=target.model.get_output_embeddings().weight)
    vocabulary, hidden = DraftVocabulary([9, 2, 33]), torch.randn(5, target.hidden_size, dtype=dtype)
    for change in (1.0, -2.0):
        with torch.no_grad():
            target.head.weight.mul_(change)
        head, whole = PackedRows(target, vocabulary, [2, 7, 7]), target.head.logits(hidden).float()
        allowed = [2, 7, 9, 33]
        expected = torch.full_like(whole, -torch.inf)
        expected[:, allowed] = whole[:, allowed]
        found = head.logits(hidden)
        torch.testing.assert_close(head.spread(found).float(), expected, rtol=2e-2, atol=2e-2)
        assert found.shape == (5, 4)
        assert torch.equal(head.tokens(found.argmax(-1)), head.spread(found).float().argmax(-1))
    with_all = PackedRows(target, None)
    assert with_all.spread(with_all.logits(hidden)).shape == whole.shape


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_the_text_is_the_targets_and_only_these_tokens_are_drafted(options, language_target, drafter, questions):
    drafter.vocabulary = DraftVocabulary(range(20, 45))
    prompts = questions[:3]
    plain = [generate_plain(language_target, ids, max_new_tokens=30, **options).token_ids for ids in prompts]
    num_accepted = 0
    for width in ("full", "auto"):
        for ids, expected in zip(prompts, plain, strict=True):
            ours = generate(language_target, drafter, ids, max_new_tokens=30, width=width, **options)
            assert ours.token_ids == expected
            place = 1
            for accepted, emitted in zip(ours.accepted_lengths, ours.emitted_lengths, strict=True):
                drafted = ours.token_ids[place : place + accepted]
                assert width == "auto" or set(drafted) <= {*range(20, 45), *ids}
                place, num_accepted = place + emitted, num_accepted + accepted
    assert num_accepted > 10
    if not options:
        together = generate_batch(language_target, drafter, prompts, max_new_tokens=30)
        assert [one.token_ids for one in together] == plain


def test_training_writes_it_where_it_loses_no_tau(language_target, language_responses, tmp_path, monkeypatch):
    """And it is loaded where it pays."""
    parts = language_target, language_responses[:21], language_responses[50:]
    run_recipe(*parts, short(), tmp_path / "a")
    seen = {token for response in language_responses[:21] for token in response.token_ids}
    path = tmp_path / "a" / VOCABULARY_FILE
    written = read_json(path)
    assert written["token_ids"] == sorted(seen | set(language_target.stop_token_ids))
    for least, all_tokens, is_used in ((0.5, False, False), (-1.0, True, False), (-1.0, False, True)):
        monkeypatch.setattr("dpace.drafter.vocabulary.MIN_SAVING", least)
        ours = load_drafter(tmp_path / "a", language_target, all_tokens=all_tokens)
        assert (ours.vocabulary is not None) == is_used
    assert ours.vocabulary.token_ids.tolist() == written["token_ids"]
    data = ResponseDataset(language_responses[50:], max_length=64, num_anchors=None, seed=0)
    ((_, temperature),) = measure_and_calibrate(ours, language_target, data, [ours.vocabulary.token_ids])
    assert ours.confidence_temperature == written["confidence_temperature"] == temperature
    for values, message in (({"token_ids": [3, 64]}, r"0 \.\. 63; copy"), ({"confidence_temperature": 0}, "above 0")):
        path.write_text(json.dumps(written | values))
        with pytest.raises(ValueError, match=message):
            load_vocabulary(tmp_path / "a", 64)
    monkeypatch.setattr("dpace.train.finish.MAX_TAU_LOSS", -0.5)
    run_recipe(*parts, short(), tmp_path / "b")
    assert not (tmp_path / "b" / VOCABULARY_FILE).exists()


def test_speculative_sampling_with_processors_drafts_any_token(language_target, drafter):
    """They may allow only tokens that the vocabulary does not have."""
    drafter.vocabulary = DraftVocabulary([30, 31])
    processors = LogitsProcessorList([lambda ids, scores: scores])
    for given, rule, is_whole in ((processors, "speculative", True), (None, "speculative", False)):
        text = Continuation([5, 6, 7], 3, 9, set(), Sampler(1.0, processors=given, seed=0))
        head = Speculation(language_target, drafter, text, width="full", verify_rule=rule).draft_rows
        assert (head.token_ids is None) == is_whole


def test_a_drafter_that_started_from_another_has_none(language_target, language_drafter, language_responses, tmp_path):
    recipe = replace(short(), drafter=replace(LANGUAGE_RECIPE.drafter, init="before"))
    run_recipe(
        language_target, language_responses[:21], language_responses[50:], recipe, tmp_path, init=language_drafter
    )
    assert (tmp_path / "provenance.json").exists() and not (tmp_path / VOCABULARY_FILE).exists()
