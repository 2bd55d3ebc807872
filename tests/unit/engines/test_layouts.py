"""Drafters of other layouts are scored and examined as they are decoded, and what is not supported is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from dpace.batches.dataset import ResponseDataset
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.vocabulary import DraftVocabulary, PackedRows
from dpace.engines.read import read_drafter
from dpace.measure.heldout import heldout_acceptance
from tests.unit.engines.conftest import LAYOUTS, RECORD, TOKENS, own_tables, small_head, with_tables


@pytest.mark.parametrize("layout", [*LAYOUTS, "markov, anchored"])
def test_what_is_scored_is_what_is_decoded(layout, folders, expected, language_target, language_responses, prompts):
    drafter = load_drafter(folders[layout], language_target)
    is_anchored = "anchored" in layout
    assert (drafter.num_slots, drafter.first_slot, drafter.block_size) == (6 - is_anchored, not is_anchored, 6)
    assert drafter.spec.num_draft_tokens == 5
    dataset = ResponseDataset(language_responses[50:][: len(prompts)], max_length=10**9, num_anchors=None, seed=0)
    decoded = sum(len(text) - 1 for text, _ in expected[layout]) / sum(steps for _, steps in expected[layout])
    tau = heldout_acceptance(drafter, language_target, dataset).tau
    assert tau == pytest.approx(decoded, abs=0.1)  # a near tie may fall the other way
    with pytest.raises(ValueError, match="sample_from_anchor is true|of its own, which training does not use"):
        drafter.start_for(language_target)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_own_tables_give_the_logits(layout, folders, language_target, questions, tmp_path):
    drafter = load_drafter(folders[layout], language_target)
    hidden = torch.randn(5, 48)
    logits = PackedRows(language_target, drafter.vocabulary, questions[0]).spread(drafter.lm_head(hidden))
    rows = load_file(folders[layout] / "model.safetensors")["lm_head.weight"]
    chosen = torch.tensor(TOKENS) if layout == "small" else torch.arange(64)
    torch.testing.assert_close(logits[:, chosen], hidden @ rows.T, rtol=1e-4, atol=1e-4)
    assert layout == "own" or logits.isinf().sum() == 5 * (64 - len(TOKENS))
    drafter.save_pretrained(tmp_path, dtype=torch.bfloat16)
    saved = Drafter.from_pretrained(tmp_path)
    assert saved.dtype == torch.bfloat16 and (layout == "own" or saved.d2t.equal(drafter.d2t))


def test_tables_that_are_the_targets_are_dropped(language_drafter_folder, language_target, tmp_path):
    plain = read_drafter(language_drafter_folder)
    same = with_tables(language_drafter_folder, tmp_path / "same", own_tables(language_target, 0.0))
    drafter = load_drafter(same, language_target)
    assert drafter.embed_tokens is drafter.lm_head is drafter.vocabulary is None
    assert drafter.spec == plain.spec
    said = with_tables(language_drafter_folder, tmp_path / "said", own_tables(language_target), has_own_lm_head=False)
    assert load_drafter(said, language_target).lm_head is read_drafter(said).lm_head is None
    small = small_head(language_target)
    path = with_tables(language_drafter_folder, tmp_path / "small", small, draft_vocab_size=len(TOKENS))
    start = load_drafter(path, language_target).start_for(language_target)
    assert start.lm_head is None and start.spec == plain.spec


def test_the_draft_vocabulary_is_written_for_speculators(folder, do_export, language_target, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    DraftVocabulary(TOKENS, 1.25).save(tmp_path / "a")
    path = do_export("speculators", folder=tmp_path / "a")
    assert read_drafter(path, num_target_layers=6).confidence_temperature == 1.25 != RECORD["confidence_temperature"]
    assert f"{len(TOKENS)} of 64 tokens" in (path / "README.md").read_text()
    tensors = load_file(path / "model.safetensors")
    ids = tensors["d2t"] + torch.arange(len(TOKENS))
    assert ids.tolist() == sorted(TOKENS) and tensors["t2d"].nonzero().flatten().tolist() == sorted(TOKENS)
    assert torch.equal(tensors["lm_head.weight"].float(), language_target.head.weight[ids])
    DraftVocabulary(range(64)).save(tmp_path / "a")  # no part of the target's
    path = do_export("speculators", folder=tmp_path / "a")
    assert "d2t" not in load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("tables", "changes", "reason"),
    [
        ({"d2t": torch.zeros(38, dtype=torch.long) + 30}, {}, "d2t does not have an offset"),
        ({"d2t": torch.zeros(38)}, {}, "d2t does not have an offset"),
        ({}, {"draft_vocab_size": None}, "have unknown d2t"),
    ],
)
def test_offsets_that_name_no_tokens_are_refused(tables, changes, reason, folders, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read_drafter(with_tables(folders["small"], tmp_path / "x", tables, **changes))
