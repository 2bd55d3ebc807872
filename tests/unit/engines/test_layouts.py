"""A drafter of each published layout is read, decoded, scored, examined, exported, and read back."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from dpace.batches.dataset import ResponseDataset, collate
from dpace.cli import main
from dpace.decode.decoder import generate_batch
from dpace.decode.loop import generate, generate_plain
from dpace.doctor.doctor import diagnose
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.views import blocks_hidden
from dpace.engines.llamacpp import run_llamacpp
from dpace.engines.published import read_folder
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance
from dpace.target import Target
from tests.conftest import make_drafter
from tests.support.files import read_json, write_rows

MAX_NEW_TOKENS = 40


def train_from_anchor(target: Target, drafter: Drafter, responses) -> None:
    """Teach slot 0 to predict the token behind the anchor, with a loop of a few lines."""
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    ids = drafter.view_options
    dataset = ResponseDataset(responses, max_length=64, num_anchors=12, seed=0)
    for step in range(100):
        rows = [dataset[(8 * step + i) % len(dataset)] for i in range(8)]
        hidden, blocks = blocks_hidden(drafter, target, collate(rows, drafter.block_size), **ids)[:2]
        logits = target.head.logits(hidden[blocks.is_scored])
        torch.nn.functional.cross_entropy(logits, blocks.labels[blocks.is_scored]).backward()
        optimizer.step()
        optimizer.zero_grad()


def change_config(folder: Path, path: Path, **changes) -> Path:
    """A copy whose `dflash_config` and top level have other values; None removes a key."""
    shutil.copytree(folder, path)
    config = read_json(path / "config.json")
    for values in (config, config["dflash_config"]):
        values |= changes
        for name in [name for name, value in values.items() if value is None and name in changes]:
            del values[name]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def anchored(language_target, language_responses, make_once) -> Path:
    """A drafter of 5 slots that gives 5 draft tokens."""

    def fill(folder: Path) -> None:
        drafter = make_drafter(language_target, block_size=5)
        for values in (vars(drafter.config), drafter.config.dflash_config):
            values["sample_from_anchor"] = True
        train_from_anchor(language_target, drafter.train(), language_responses[:50])
        drafter.save_pretrained(folder / "drafter")

    return make_once("anchored", fill) / "drafter"


def examine(folder: Path, target_folder: Path, responses: Path, capsys, *flags: str) -> tuple[int, str]:
    """What `dpace doctor` says."""
    arguments = ["doctor", str(folder), "--target", str(target_folder), "--responses", str(responses), *flags]
    code = main(arguments)
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


@pytest.fixture(scope="session")
def responses_file(language_responses, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    write_rows(path, [vars(response) for response in language_responses[50:]])
    return path


def our_texts(target: Target, drafter: Drafter, prompts) -> tuple[list[list[int]], Acceptance]:
    """Texts of all ways of decoding, which are the target's own, and accepted lengths of whole blocks."""
    plain = [generate_plain(target, ids, max_new_tokens=MAX_NEW_TOKENS).token_ids for ids in prompts]
    done = [generate(target, drafter, ids, max_new_tokens=MAX_NEW_TOKENS, width="full") for ids in prompts]
    batch = generate_batch(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    auto = [generate(target, drafter, ids, max_new_tokens=MAX_NEW_TOKENS) for ids in prompts]
    for outs in (done, batch, auto):
        assert [out.token_ids for out in outs] == plain
    assert [out.widths for out in batch] == [out.widths for out in done]
    return plain, Acceptance.of_prompts([out.acceptance for out in done])


def scored(target: Target, drafter: Drafter, responses) -> Acceptance:
    dataset = ResponseDataset(responses, max_length=10**9, num_anchors=None, seed=0)
    return heldout_acceptance(drafter, target, dataset)


def test_slots_that_begin_at_the_anchor_are_decoded_and_scored(
    anchored, language_target, language_responses, questions
):
    drafter = load_drafter(anchored, language_target)
    assert (drafter.num_slots, drafter.first_slot, drafter.block_size) == (5, 0, 6)
    assert drafter.spec.num_draft_tokens == 5
    _, decoded = our_texts(language_target, drafter, questions)
    assert decoded.tau > 1.5 and decoded.block_size == 6
    trained = scored(language_target, drafter, language_responses[50:])
    assert abs(trained.tau - decoded.tau) < 0.2  # responses are cut at 32 tokens, texts at 40


@pytest.mark.parametrize("to", ["gguf", "speculators"])
def test_formats_that_can_say_so_carry_the_anchor(
    to, anchored, language_target, language_folder, target_gguf, questions, tmp_path, capsys
):
    flags = ["--target", str(language_folder), "--target-gguf", str(target_gguf)]
    assert main(["export", str(anchored), *flags, "--to", to, "--output", str(tmp_path / to)]) == 0
    assert main(["import", str(tmp_path / to), "--target", str(language_folder), "--output", str(tmp_path / "b")]) == 0
    assert read_folder(tmp_path / "b")[0] == read_folder(anchored)[0]
    card = (tmp_path / to / "README.md").read_text()
    assert "sample_from_anchor" in card and '"num_speculative_tokens": 5' in card or to == "gguf"
    if to == "speculators":
        assert read_json(tmp_path / to / "config.json")["sample_from_anchor"] is True
        return
    assert "--spec-type draft-dspark --spec-draft-n-max 5" in card
    drafter = load_drafter(anchored, language_target)
    ours = [generate(language_target, drafter, ids, max_new_tokens=MAX_NEW_TOKENS, width="full") for ids in questions]
    (path,) = (tmp_path / to).glob("*.gguf")
    options = {"max_new_tokens": MAX_NEW_TOKENS, "drafter_gguf": path, "num_draft_tokens": 5, "from_anchor": True}
    theirs = run_llamacpp(target_gguf, questions, **options)
    assert [answer.token_ids for answer in theirs] == [out.token_ids for out in ours]
    steps = [(answer.num_drafted / 5, len(out.widths)) for answer, out in zip(theirs, ours, strict=True)]
    assert all(abs(a - b) <= 1 for a, b in steps)  # a near tie may fall the other way


def test_other_formats_and_training_refuse_the_anchor_by_its_key(
    anchored, language_target, language_folder, tmp_path, capsys
):
    flags = ["--target", str(language_folder), "--output", str(tmp_path / "out")]
    for to in ("zlab", "vllm", "sglang"):
        assert main(["export", str(anchored), *flags, "--to", to]) == 1
        assert "sample_from_anchor is true" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sample_from_anchor is true"):
        load_drafter(anchored, language_target).start_for(language_target)


@pytest.mark.parametrize("spelling", [{"query_zero_predicts_next": True, "sample_from_anchor": None}, {}])
def test_doctor_names_slots_that_begin_at_the_anchor(
    spelling, anchored, language_target, language_folder, responses_file, tmp_path, capsys
):
    folder = change_config(anchored, tmp_path / "said", **spelling)
    code, said = examine(folder, language_folder, responses_file, capsys, "--engine", "llamacpp")
    assert code == 0 and "--spec-type draft-dspark --spec-draft-n-max 5" in said
    code, said = examine(folder, language_folder, responses_file, capsys, "--engine", "vllm")
    assert code == 1 and "failed: engine, slots" in said
    silent = change_config(anchored, tmp_path / "silent", sample_from_anchor=None)
    code, said = examine(silent, language_folder, responses_file, capsys)
    assert code == 1 and "failed: sample_from_anchor" in said
    (found,) = [d.found for d in diagnose(silent, language_target, responses=responses_file) if "sample" in d.check]
    tau, shifted = map(float, re.findall(r"\d\.\d+", found))
    assert shifted > 1.5 > tau


def test_doctor_names_slots_that_do_not_begin_there(
    language_drafter_folder, language_folder, responses_file, tmp_path, capsys
):
    code, said = examine(language_drafter_folder, language_folder, responses_file, capsys)
    assert code == 0 and "sample_from_anchor" in said
    wrong = change_config(language_drafter_folder, tmp_path / "wrong", sample_from_anchor=True)
    code, said = examine(wrong, language_folder, responses_file, capsys)
    assert code == 1 and "sample_from_anchor" in said.split("failed:")[1]
