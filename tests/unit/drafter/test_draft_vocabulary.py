"""Drafts of some tokens only: which are drafted, what is measured, and when it is used; texts are in `tests/golden`."""

import json

import pytest
import torch

from dpace.drafter import load_drafter
from dpace.drafter.vocabulary import VOCABULARY_FILE, DraftVocabulary, PackedRows, load_vocabulary
from dpace.training.finish import measure_and_calibrate
from tests.support.files import read_json
from tests.support.models import make_target
from tests.unit.training.test_train import measured, run_recipe, short


@pytest.mark.parametrize(("family", "is_packed"), [("qwen3", True), ("qwen3", False), ("gemma2", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_head_with_all_other_tokens_left_out(family, is_packed, dtype, monkeypatch):
    """With the prompt's tokens, caps and scales; again after the head has changed; where nothing is packed, too."""
    if not is_packed:
        monkeypatch.setattr("dpace.drafter.vocabulary.pack", lambda weight: None)
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


def test_training_writes_it_where_it_loses_no_tau(language_target, language_responses, tmp_path, monkeypatch):
    """And it is loaded where it pays."""
    parts = language_responses[:21], language_responses[50:52]
    run_recipe(language_target, *parts, short(), tmp_path)
    seen = {token for response in parts[0] for token in response.token_ids}
    path = tmp_path / VOCABULARY_FILE
    written = read_json(path)
    assert written["token_ids"] == sorted(seen | set(language_target.stop_token_ids))
    for least, is_used in ((0.5, False), (-1.0, True)):
        monkeypatch.setattr("dpace.drafter.vocabulary.MIN_SAVING", least)
        ours = load_drafter(tmp_path, language_target)
        assert (ours.vocabulary is not None) == is_used
    assert ours.vocabulary.token_ids.tolist() == written["token_ids"]
    data = measured(parts[1])
    ((_, temperature),) = measure_and_calibrate(ours, language_target, data, [ours.vocabulary.token_ids])
    assert ours.confidence_temperature == written["confidence_temperature"] == temperature
    for values, message in (
        ({"token_ids": [3, 64]}, r"0 \.\. 63; copy"),
        ({"confidence_temperature": 0}, "greater than 0"),
    ):
        path.write_text(json.dumps(written | values))
        with pytest.raises(ValueError, match=message):
            load_vocabulary(tmp_path, 64)


@pytest.mark.parametrize("init", ["before", None])
def test_none_is_written_that_loses_tau_or_for_a_drafter_that_started_from_another(
    init, language_target, language_drafter, language_responses, tmp_path, monkeypatch
):
    if not init:
        monkeypatch.setattr("dpace.training.finish.MAX_TAU_LOSS", -0.5)
    parts = language_responses[:21], language_responses[50:52]
    run_recipe(language_target, *parts, short({"init": init}), tmp_path, init=language_drafter if init else None)
    assert (tmp_path / "provenance.json").exists() and not (tmp_path / VOCABULARY_FILE).exists()
