"""What is trained on is what the files say."""

import weakref
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpace.batches.corpus import Corpus, load_corpus, read_corpora
from dpace.batches.dataset import ResponseDataset
from dpace.blocks import sample_anchors
from dpace.config import PromptsConfig, RespondConfig
from dpace.prompts.prompts import Prompt, split_ids
from dpace.report.data_page import prompts_page, responses_page
from dpace.report.tables import console
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response, read_responses
from tests.conftest import EOS, make_target, make_tokenizer
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


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(spans=st.lists(SPANS, max_size=4), max_length=st.integers(2, 14))
def test_anchors_are_counted_without_looking_at_tokens(spans, max_length):
    responses = [Response(str(i), "", [], list(range(12)), list(map(list, s))) for i, s in enumerate(spans)]
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


def test_own_answers_are_scored_where_the_template_puts_them(tmp_path):
    """The template ends an answer with the stop token; two answers of a conversation have two spans."""
    target = make_target("qwen3")
    target.tokenizer = make_tokenizer()
    target.tokenizer.chat_template = (
        "{% for m in messages %}{{ 'ask ' if m.role == 'user' else 'answer ' }}{{ m.content }} "
        "{{ '<eos> ' if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}{{ 'answer' }}{% endif %}"
    )
    said = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4")]
    turn = [{"role": role, "content": content} for role, content in said]
    config = RespondConfig(source="own")
    (response,) = write_responses(target, [Prompt("a", "s", [turn], "w5 w6")], tmp_path / "r.jsonl", config)
    scored = [response.token_ids[start:end] for start, end in response.response_spans]
    assert scored == [target.tokenizer("w3")["input_ids"] + [EOS], target.tokenizer("w5 w6")["input_ids"] + [EOS]]
    assert response.messages[-1] == {"role": "assistant", "content": "w5 w6"}
    target.tokenizer.chat_template = target.tokenizer.chat_template.replace("'answer' }}{% endif", "'w9' }}{% endif")
    (other,) = write_responses(target, [Prompt("a", "s", [turn[:1]], "w5")], tmp_path / "o" / "r.jsonl", config)
    assert other.token_ids[-2:] == [*target.tokenizer("w5")["input_ids"], EOS], "the prompt is not the text's beginning"
    with pytest.raises(ValueError, match="prompt b has no reply at its end"):
        write_responses(target, [Prompt("b", "s", [turn])], tmp_path / "b" / "r.jsonl", config)


def test_few_answers_are_in_memory_together(tmp_path, monkeypatch):
    """Comparisons read lengths and tokens, and not what was said."""
    rows = [Response(str(i), "s", [{"role": "user", "content": "q"}], [5] * (i + 2), [[0, 2]]) for i in range(40)]
    path = Path(write_rows(tmp_path / "responses.jsonl", map(asdict, rows)))
    living = weakref.WeakSet()
    most = []

    def make(*values):
        living.add(response := Response(*values))
        most.append(len(living))
        return response

    monkeypatch.setattr("dpace.respond.responses.Response.__hash__", object.__hash__)
    monkeypatch.setattr("dpace.respond.responses.Response", make)
    monkeypatch.setattr("dpace.respond.responses.fields", lambda _: fields(Response))
    monkeypatch.setattr("dpace.batches.corpus.BATCH_ROWS", 3)
    first, second = read_corpora(path, [["30", "7", "none"], ["1"]])
    assert [first.id(i) for i in range(len(first))] == ["30", "7"] and second.lengths.tolist() == [3]
    assert len(read_corpora(path, [[one.id for one in rows]])[0]) == 40
    assert max(most) <= 3 + 3 + 1, "two batches and the next row"


def test_one_page_says_what_is_there(files, capsys):
    path, config = files
    corpus, _ = load_corpus(path, config)
    page = responses_page(corpus, 20, {"max_new_tokens": 10}, make_tokenizer())
    console().print(prompts_page(split_ids(config)), page)
    shown = capsys.readouterr().out
    lengths = np.concatenate([np.diff(corpus.spans(i), axis=1).ravel() for i in range(len(corpus))])
    assert f"at --respond.max-new-tokens 10: {(lengths == 10).sum()} of {len(lengths)}" in shown
    assert f"conversations cut at --train.max-length 20: {(corpus.lengths > 20).sum()}" in shown
    assert "25 to train on, 2 for validation, 3 held out" in shown and "⟦" in shown
    assert f"{len(corpus)} conversations, " in shown and "answers, all turns" in shown
