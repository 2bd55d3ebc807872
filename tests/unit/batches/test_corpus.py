"""What is trained on is what the files say."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpace.batches.corpus import Answers, Corpus, _batches, load_corpus, read_corpora
from dpace.batches.dataset import ResponseDataset
from dpace.blocks import sample_anchors
from dpace.config import PromptsConfig, Recipe
from dpace.prompts.prompts import split_ids
from dpace.report.data_page import prompts_page, responses_page
from dpace.report.tables import console
from dpace.respond.responses import Response, read_responses
from dpace.system.provenance import hash_file
from tests.conftest import make_tokenizer
from tests.support.files import write_rows


@pytest.fixture
def files(tmp_path):
    """30 prompts, and answers to most of them in another order."""
    prompts = tmp_path / "p.jsonl"
    write_rows(prompts, [{"prompt": f"q{i}", "id": f"p{i}"} for i in range(30)])
    rows = [
        Response(f"p{i}", "s", [{"role": "user", "content": f"q{i}"}], list(range(i + 3)), [[1, 2 + i // 2]])
        for i in range(29, 2, -1)
    ]
    write_rows(tmp_path / "responses.jsonl", [asdict(row) for row in rows])
    return tmp_path / "responses.jsonl", PromptsConfig(path=str(prompts))


def as_rows(corpus):
    return [(corpus.id(i), corpus.token_ids(i).tolist(), corpus.spans(i).tolist()) for i in range(len(corpus))]


def test_the_corpus_is_what_the_files_say_and_is_made_again_when_they_change(files):
    path, config = files
    by_id = {response.id: response for response in read_responses(path)}
    split = split_ids(config)
    parts = [as_rows(corpus) for corpus in load_corpus(path, config)]
    for rows, ids in zip(parts, split[:2], strict=True):
        assert rows == [(i, by_id[i].token_ids, by_id[i].response_spans) for i in ids if i in by_id]
    made = path.with_name("corpus.arrow")
    first, written = made.read_bytes(), made.stat().st_mtime_ns
    load_corpus(path, config)
    assert made.stat().st_mtime_ns == written
    made.write_bytes(first[: len(first) // 2])
    assert as_rows(load_corpus(path, config)[0]) == parts[0]
    assert len(load_corpus(path, replace(config, limit=4))[0]) <= 4
    path.write_text(path.read_text().replace('"token_ids": [0, ', '"token_ids": [7, '))
    assert load_corpus(path, config)[0].token_ids(0)[0] == 7
    made.write_text("another's")
    path.with_name(".dpace.json").unlink()
    with pytest.raises(ValueError, match="was not written by dpace"):
        load_corpus(path, config)


SPANS = st.lists(st.integers(0, 12), max_size=8, unique=True).map(
    lambda edges: [list(edges) for edges in zip(*[iter(sorted(edges))] * 2, strict=False)]
)


@settings(deadline=None, max_examples=60)
@given(spans=st.lists(SPANS, max_size=4), max_length=st.integers(2, 14))
def test_anchors_are_counted_without_looking_at_tokens(spans, max_length):
    responses = [Response(str(i), "", [], list(range(12)), s) for i, s in enumerate(spans)]
    corpus = Corpus.of(responses)
    flags = [[any(start <= i < end for start, end in r.response_spans) for i in range(12)] for r in responses]
    expected = [len(sample_anchors(of_text[:max_length])) for of_text in flags]
    assert corpus.num_anchors(max_length).tolist() == expected
    dataset = ResponseDataset(corpus, max_length=max_length, num_anchors=None, seed=0)
    kept = [number for number, count in enumerate(expected) if count]
    assert dataset.ids == [str(number) for number in kept]
    found = [dataset.is_response(i).tolist() for i in range(len(dataset))]
    assert found == [flags[number][:max_length] for number in kept]
    assert dataset.seen_tokens.tolist() == list(range(min(12, max_length))) * bool(kept)


def test_few_answers_are_in_memory_together(monkeypatch):
    taken = []
    rows = ((Response(str(i), "s", [], [5], []), taken.append(i) or 0, i) for i in range(40))
    monkeypatch.setattr("dpace.batches.corpus.BATCH_ROWS", 3)
    assert len(next(_batches(rows))) == len(taken) == 3


def test_comparisons_read_parts_in_the_order_of_their_prompts(files):
    first, second = read_corpora(files[0], [["p20", "p7", "none"], ["p5"]])
    assert [first.id(i) for i in range(len(first))] == ["p20", "p7"] and second.lengths.tolist() == [8]


def test_answers_that_are_not_the_targets_are_refused(files):
    path, prompts = files
    meta = path.with_name("responses.meta.json")
    whole = {"target": "t", "target_sha256": "0", "dtype": "torch.float32", "thinking": False}

    def refuse(message, **changes):
        meta.write_text(json.dumps({**whole, "responses_sha256": hash_file(path), **changes}))
        with pytest.raises(ValueError, match=message):
            answers = Answers(Recipe(prompts=prompts, output=str(path.parent)), "dpace respond")
            answers.refuse_others({"target_sha256": "1", "dtype": "bfloat16"})

    refuse("an interrupted `dpace respond`; run `dpace respond`", complete=False)
    refuse("was changed", responses_sha256="0")
    refuse("other weights of the target")
    refuse('dtype "float32", not "bfloat16"', target_sha256="1")
    refuse("thinking true, not false", thinking=True)
    whole.pop("target")
    refuse("no meta file .* which target made")


def test_one_page_says_what_is_there(files, capsys):
    path, config = files
    corpus, _ = load_corpus(path, config)
    page = responses_page(corpus, 20, {"max_new_tokens": 10}, make_tokenizer())
    console().print(prompts_page(split_ids(config)), page)
    shown = capsys.readouterr().out
    lengths = [end - start for i in range(len(corpus)) for start, end in corpus.spans(i)]
    assert f"at --respond.max-new-tokens 10: {lengths.count(10)} of {len(lengths)}" in shown
    assert f"conversations cut at --train.max-length 20: {(corpus.lengths > 20).sum()}" in shown
    assert "25 to train on, 2 for validation, 3 held out" in shown and "⟦" in shown
    assert f"{len(corpus)} conversations, " in shown and "answers, all turns" in shown
