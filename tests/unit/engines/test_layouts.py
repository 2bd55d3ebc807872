"""A drafter of each published layout is read, decoded, scored, examined, exported, and read back."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from llamacpp import run_llamacpp
from safetensors.torch import load_file
from transformers import TypicalLogitsWarper

from dpace.batches.dataset import ResponseDataset, collate
from dpace.cli import main
from dpace.decode.decoder import generate_batch
from dpace.decode.loop import Speculation, generate, generate_plain
from dpace.decode.request import make_continuation
from dpace.doctor.doctor import diagnose
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.views import blocks_hidden
from dpace.drafter.vocabulary import DraftVocabulary, PackedRows
from dpace.engines.published import read_folder
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance
from dpace.target import Target
from tests.conftest import EOS, decode_whole, make_drafter
from tests.support.files import changed_json, changed_weights, read_json, write_rows

MAX_NEW_TOKENS = 40


def train_from_anchor(target: Target, drafter: Drafter, responses) -> None:
    """Teach slot 0 to predict the token behind the anchor, with a loop of a few lines."""
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    dataset = ResponseDataset(responses, max_length=64, num_anchors=12, seed=0)
    for step in range(100):
        rows = [dataset[(8 * step + i) % len(dataset)] for i in range(8)]
        hidden, blocks = blocks_hidden(drafter, target, collate(rows, drafter.block_size))[:2]
        logits = target.head.logits(hidden[blocks.is_scored])
        torch.nn.functional.cross_entropy(logits, blocks.labels[blocks.is_scored]).backward()
        optimizer.step()
        optimizer.zero_grad()


def change_config(folder: Path, path: Path, **changes) -> Path:
    """A copy whose `dflash_config` and top level have other values; None removes a key."""
    shutil.copytree(folder, path)
    with changed_json(path / "config.json") as config:
        for values in (config, config["dflash_config"]):
            values.update(changes)
            for name in [name for name in changes if changes[name] is None]:
                del values[name]
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
    done = decode_whole(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    batch = generate_batch(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    auto = [generate(target, drafter, ids, max_new_tokens=MAX_NEW_TOKENS) for ids in prompts]
    for outs in (done, batch, auto):
        assert [out.token_ids for out in outs] == plain
    assert [out.widths for out in batch] == [out.widths for out in done]
    return plain, Acceptance.of_prompts([out.acceptance for out in done])


def assert_llamacpp_agrees(target_gguf: Path, folder: Path, target: Target, drafter: Drafter, prompts, **options):
    """With a file that was exported to the folder: the texts of a drafter, and about as many verifications."""
    ours = decode_whole(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    (path,) = folder.glob("*.gguf")
    options |= {"max_new_tokens": MAX_NEW_TOKENS, "drafter_gguf": path, "num_draft_tokens": 5}
    theirs = run_llamacpp(target_gguf, prompts, **options)
    assert [answer.token_ids for answer in theirs] == [out.token_ids for out in ours]
    steps = [(answer.num_drafted / 5, len(out.widths)) for answer, out in zip(theirs, ours, strict=True)]
    assert all(abs(a - b) <= 1 for a, b in steps)  # a near tie may fall the other way


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
    to, anchored, language_target, language_folder, target_gguf, questions, tmp_path
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
    ours = load_drafter(anchored, language_target)
    assert_llamacpp_agrees(target_gguf, tmp_path / to, language_target, ours, questions, from_anchor=True)


def test_other_formats_and_training_refuse_the_anchor_by_its_key(
    anchored, language_target, language_folder, tmp_path, capsys
):
    flags = ["--target", str(language_folder), "--output", str(tmp_path / "out")]
    for to in ("zlab", "vllm", "sglang"):
        assert main(["export", str(anchored), *flags, "--to", to]) == 1
        assert "the drafter has sample_from_anchor True" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sample_from_anchor is true"):
        load_drafter(anchored, language_target).start_for(language_target)


@pytest.mark.parametrize("spelling", [{"query_zero_predicts_next": True, "sample_from_anchor": None}, {}])
def test_doctor_names_slots_that_begin_at_the_anchor(
    spelling, anchored, language_target, language_folder, responses_file, tmp_path, capsys
):
    folder = change_config(anchored, tmp_path / "said", **spelling)
    code, said = examine(folder, language_folder, responses_file, capsys, "--engine", "gguf")
    assert code == 0 and "--spec-type draft-dspark --spec-draft-n-max 5" in said
    code, said = examine(folder, language_folder, responses_file, capsys, "--engine", "vllm")
    assert code == 1 and "failed: engine: vllm" in said
    silent = change_config(anchored, tmp_path / "silent", sample_from_anchor=None)
    code, said = examine(silent, language_folder, responses_file, capsys)
    assert code == 1 and "failed: measured sample_from_anchor" in said
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


TOKENS = [*range(4, 39), 51, EOS, 0]
"""Of a small vocabulary, in no order, with all tokens of the prompts: those are drafted in any case."""


def with_tables(folder: Path, path: Path, tables: dict[str, torch.Tensor], **changes) -> Path:
    """A copy whose weights have further tensors."""
    change_config(folder, path, **changes)
    with changed_weights(path) as weights:
        weights.update(tables)
    return path


def small_head(target: Target, change: float = 0.0) -> dict[str, torch.Tensor]:
    """The target's rows for `TOKENS`, or others, as speculators and vLLM store them."""
    rows = target.head.weight[torch.tensor(TOKENS)]
    t2d = torch.zeros(64, dtype=torch.bool)
    t2d[TOKENS] = True
    d2t = torch.tensor(TOKENS) - torch.arange(len(TOKENS))
    return {"lm_head.weight": rows + change * torch.randn_like(rows), "d2t": d2t, "t2d": t2d}


def own_tables(target: Target) -> dict[str, torch.Tensor]:
    """An embedding and a head for all tokens that differ from the target's."""
    tables = {"embed_tokens.weight": target.model.get_input_embeddings().weight, "lm_head.weight": target.head.weight}
    return {name: table + 0.02 * torch.randn_like(table) for name, table in tables.items()}


@pytest.fixture(scope="session")
def layouts(language_drafter_folder, language_target, make_once) -> dict[str, Path]:
    """One drafter of each layout with tables of its own, from one that accepts well."""

    def fill(made: Path) -> None:
        torch.manual_seed(0)
        small = {"draft_vocab_size": len(TOKENS), "dpace": None}
        with_tables(language_drafter_folder, made / "small", small_head(language_target, 0.01), **small)
        with_tables(language_drafter_folder, made / "own", own_tables(language_target), dpace=None)

    made = make_once("layouts", fill)
    return {"small": made / "small", "own": made / "own"}


KEYS = {"small": "draft_vocab_size", "own": "has_own_embed_tokens"}
FORMATS = {"small": ["gguf", "vllm", "speculators"], "own": ["gguf", "vllm"]}


@pytest.mark.parametrize("layout", KEYS)
def test_own_tables_are_decoded_scored_and_checked(
    layout, layouts, language_target, language_folder, language_responses, questions, tmp_path
):
    drafter = load_drafter(layouts[layout], language_target)
    _, decoded = our_texts(language_target, drafter, questions)
    assert decoded.tau > 1.3
    trained = scored(language_target, drafter, language_responses[50:])
    assert abs(trained.tau - decoded.tau) < 0.2
    hidden = torch.randn(5, 48)
    logits = PackedRows(language_target, drafter.vocabulary, questions[0]).spread(drafter.lm_head(hidden))
    rows = load_file(layouts[layout] / "model.safetensors")["lm_head.weight"]
    chosen = torch.tensor(TOKENS) if layout == "small" else torch.arange(64)
    torch.testing.assert_close(logits[:, chosen], hidden @ rows.T, rtol=1e-4, atol=1e-4)
    assert layout == "own" or logits.isinf().sum() == 5 * (64 - len(TOKENS))
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"id": "a", "turns": ["w3 w51"]}])
    flags = ["--drafter", str(layouts[layout]), "--target", str(language_folder), "--prompts", str(prompts)]
    assert main(["check", *flags, "--max-new-tokens", "12"]) == 0


@pytest.mark.parametrize("layout", KEYS)
def test_processors_leave_a_whole_head_to_the_drafter(layout, layouts, language_target):
    """They may allow only tokens that a small one does not have."""
    drafter = load_drafter(layouts[layout], language_target)
    text = make_continuation(language_target, [4, 20], temperature=1.0, max_new_tokens=9)
    text.sampler.processors.append(TypicalLogitsWarper())
    head = Speculation(language_target, drafter, text, width="full", verify_rule="speculative").draft_rows
    assert (head.token_ids is None) == (layout == "small")


@pytest.mark.parametrize(("layout", "to"), [(layout, to) for layout in FORMATS for to in FORMATS[layout]])
def test_own_tables_are_exported_and_read_back(
    layout, to, layouts, language_target, language_folder, target_gguf, questions, tmp_path
):
    flags = ["--target", str(language_folder), "--target-gguf", str(target_gguf)]
    assert main(["export", str(layouts[layout]), *flags, "--to", to, "--output", str(tmp_path / to)]) == 0
    again = tmp_path / "again"
    assert main(["import", str(tmp_path / to), "--target", str(language_folder), "--output", str(again)]) == 0
    assert read_folder(again)[0] == read_folder(layouts[layout])[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (layouts[layout], again))
    assert after.keys() == before.keys() - {"t2d"}
    assert all(torch.equal(after[name].to(before[name]), before[name]) for name in after)
    if to == "speculators":
        assert torch.equal(load_file(tmp_path / to / "model.safetensors")["t2d"], before["t2d"])
        assert read_json(tmp_path / to / "config.json")["draft_vocab_size"] == len(TOKENS)
    if to == "vllm":
        card = (tmp_path / to / "README.md").read_text()
        assert "vllm serve" in card and not re.search("sglang|TensorRT|trust_remote_code", card), "they ignore tables"
    if to == "gguf":
        ours = load_drafter(layouts[layout], language_target)
        assert_llamacpp_agrees(target_gguf, tmp_path / to, language_target, ours, questions)


@pytest.mark.parametrize("layout", KEYS)
def test_formats_without_own_tables_and_training_refuse_them_by_name(
    layout, layouts, language_target, language_folder, tmp_path, capsys
):
    flags = ["--target", str(language_folder), "--output", str(tmp_path / "out")]
    for to in {"zlab", "sglang", "vllm", "speculators"} - {*FORMATS[layout]}:
        assert main(["export", str(layouts[layout]), *flags, "--to", to]) == 1
        assert KEYS[layout] in capsys.readouterr().err
    drafter = load_drafter(layouts[layout], language_target)
    with pytest.raises(ValueError, match="of its own, which training does not use"):
        drafter.start_for(language_target)


def test_tables_that_are_the_targets_are_dropped(language_drafter_folder, language_target, tmp_path):
    tables = {"embed_tokens.weight": language_target.model.get_input_embeddings().weight}
    tables |= {"lm_head.weight": language_target.head.weight}
    same = load_drafter(with_tables(language_drafter_folder, tmp_path / "same", tables), language_target)
    assert same.embed_tokens is same.lm_head is same.vocabulary is None
    assert same.spec == read_folder(language_drafter_folder)[0]
    own = {name: -table for name, table in tables.items()}
    said = with_tables(
        language_drafter_folder, tmp_path / "said", own, has_own_embed_tokens=False, has_own_lm_head=False
    )
    assert load_drafter(said, language_target).lm_head is None
    assert {*read_folder(said)[1]} == {*load_file(language_drafter_folder / "model.safetensors")}
    small = {"draft_vocab_size": len(TOKENS)}
    path = with_tables(language_drafter_folder, tmp_path / "small", small_head(language_target), **small)
    start = load_drafter(path, language_target).start_for(language_target)
    assert start.lm_head is None and start.spec == same.spec
    start.save_pretrained(tmp_path / "start")
    assert read_folder(tmp_path / "start")[0] == same.spec


def test_the_draft_vocabulary_is_written_for_speculators(
    language_drafter_folder, language_target, language_folder, tmp_path, capsys
):
    shutil.copytree(language_drafter_folder, tmp_path / "a")
    DraftVocabulary(TOKENS).save(tmp_path / "a")
    flags = ["--target", str(language_folder), "--to", "speculators", "--output", str(tmp_path / "b")]
    assert main(["export", str(tmp_path / "a"), *flags]) == 0
    assert f"the LM head has {len(TOKENS)} of 64 tokens, those of draft_vocabulary.json" in capsys.readouterr().err
    assert f"{len(TOKENS)} of 64 tokens" in (tmp_path / "b" / "README.md").read_text()
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    ids = tensors["d2t"] + torch.arange(len(TOKENS))
    assert ids.tolist() == sorted(TOKENS) and tensors["t2d"].nonzero().flatten().tolist() == sorted(TOKENS)
    assert torch.equal(tensors["lm_head.weight"].float(), language_target.head.weight[ids])
    assert main(["import", str(tmp_path / "b"), "--output", str(tmp_path / "c")]) == 0
    ours = load_drafter(language_drafter_folder, language_target)
    ours.vocabulary = DraftVocabulary(TOKENS)
    theirs = load_drafter(tmp_path / "c", language_target)
    done = [decode_whole(language_target, drafter, [[4, 20, 51, 5]], max_new_tokens=30) for drafter in (ours, theirs)]
    assert done[0][0].widths == done[1][0].widths
    DraftVocabulary(range(64)).save(tmp_path / "a")  # no part of the target's
    assert main(["export", str(tmp_path / "a"), *flags[:-1], str(tmp_path / "d")]) == 0
    assert "d2t" not in load_file(tmp_path / "d" / "model.safetensors")


@pytest.mark.parametrize(
    ("tables", "changes", "reason"),
    [
        ({"d2t": torch.zeros(38, dtype=torch.long) + 30}, {}, "d2t does not have an offset"),
        ({"d2t": -torch.arange(38)}, {}, "d2t does not have an offset"),
        ({"d2t": torch.zeros(38)}, {}, "d2t does not have an offset"),
        ({"lm_head.weight": torch.zeros(3, 48)}, {}, "lm_head.weight has shape"),
        ({}, {"draft_vocab_size": 12}, "has shape"),
        ({}, {"draft_vocab_size": None}, "unknown .'d2t'"),
        ({}, {"draft_vocab_size": "x"}, "draft_vocab_size is 'x'"),
        ({}, {"markov_rank": 256}, "markov_rank"),
        ({}, {"attention_sink_bias": True}, "attention_sink_bias"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(
    tables, changes, reason, layouts, language_target, tmp_path, capsys
):
    path = with_tables(layouts["small"], tmp_path / "x", tables, **changes)
    assert main(["import", str(path), "--output", str(tmp_path / "y")]) == 1
    assert re.search(reason, capsys.readouterr().err)
    if not any(table.is_floating_point() for table in tables.values()):
        with pytest.raises(ValueError):
            load_drafter(path, language_target)


@pytest.mark.parametrize("layout", KEYS)
def test_doctor_knows_own_tables(layout, layouts, language_folder, responses_file, capsys):
    code, said = examine(layouts[layout], language_folder, responses_file, capsys)
    assert code == 0 and "own lm_head" in said
