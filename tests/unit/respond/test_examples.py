"""What is trained on is what the files say."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from dpace.batches.dataset import ResponseDataset
from dpace.blocks import sample_anchors
from dpace.config import PromptsConfig, Recipe
from dpace.prompts.prompts import split_and_explain
from dpace.report.data_page import prompts_page, responses_page
from dpace.report.tables import console
from dpace.respond.responses import (
    Example,
    Response,
    find_answers,
    load_examples,
    read_responses,
    refuse_other_answers,
)
from dpace.system.provenance import hash_file
from tests.support.files import write_rows
from tests.support.models import make_tokenizer


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


def as_rows(examples):
    return [(one.id, one.token_ids.tolist(), one.spans) for one in examples]


def test_what_is_trained_on_is_what_the_files_say(files, capsys):
    path, config = files
    by_id = {response.id: response for response in read_responses(path)}
    parts, _ = split_and_explain(config)
    for examples, prompts in zip(load_examples(path, config), parts[:2], strict=True):
        expected = [by_id[prompt.id] for prompt in prompts if prompt.id in by_id]
        assert as_rows(examples) == [(one.id, one.token_ids, one.response_spans) for one in expected]
    assert "left out: no answer" in capsys.readouterr().err
    assert len(load_examples(path, replace(config, limit=4))[0]) <= 4
    write_rows(Path(config.path), [{"prompt": f"other {i}", "id": f"p{i}"} for i in range(30)])
    with pytest.raises(ValueError, match="but to another text; put the prompts back"):
        load_examples(path, config)


SPANS = st.lists(st.integers(0, 12), max_size=8, unique=True).map(
    lambda edges: [list(edges) for edges in zip(*[iter(sorted(edges))] * 2, strict=False)]
)


@settings(deadline=None, max_examples=60)
@given(spans=st.lists(SPANS, max_size=4), max_length=st.integers(2, 14))
def test_anchors_are_counted_without_looking_at_tokens(spans, max_length):
    responses = [Response(str(i), "", [], list(range(12)), s) for i, s in enumerate(spans)]
    examples = [Example.of(response) for response in responses]
    flags = [[any(start <= i < end for start, end in r.response_spans) for i in range(12)] for r in responses]
    expected = [len(sample_anchors(of_text[:max_length])) for of_text in flags]
    assert [example.num_anchors(max_length) for example in examples] == expected
    dataset = ResponseDataset(examples, max_length=max_length, num_anchors=None, seed=0)
    kept = [number for number, count in enumerate(expected) if count]
    assert dataset.ids == [str(number) for number in kept]
    found = [dataset.is_response(i).tolist() for i in range(len(dataset))]
    assert found == [flags[number][:max_length] for number in kept]
    assert dataset.seen_tokens.tolist() == list(range(min(12, max_length))) * bool(kept)


def test_answers_that_are_not_the_targets_are_refused(files):
    path, prompts = files
    meta = path.with_name("responses.meta.json")
    whole = {"target": "t", "target_sha256": "0", "dtype": "float32", "thinking": False, "complete": True}

    def refuse(message, **changes):
        meta.write_text(json.dumps({**whole, "responses_sha256": hash_file(path), **changes}))
        with pytest.raises(ValueError, match=message):
            found = find_answers(Recipe(prompts=prompts, output=str(path.parent)), "dpace respond")
            refuse_other_answers(path, found, {"target_sha256": "1", "dtype": "bfloat16"})

    refuse("an interrupted `dpace respond`; run `dpace respond`", complete=False)
    refuse("was changed", responses_sha256="0")
    refuse("other weights of the target")
    refuse('dtype "float32", not "bfloat16"', target_sha256="1")
    refuse("thinking true, not false", thinking=True)
    meta.unlink()
    with pytest.raises(ValueError, match="no meta file .* which target made"):
        find_answers(Recipe(prompts=prompts, output=str(path.parent)), "dpace respond")


def test_one_page_says_what_is_there(files, capsys):
    path, config = files
    examples, _ = load_examples(path, config)
    page = responses_page(examples, 20, {"max_new_tokens": 10}, make_tokenizer())
    console().print(prompts_page(*split_and_explain(config)), page)
    shown = capsys.readouterr().out
    lengths = [end - start for example in examples for start, end in example.spans]
    assert f"at --respond.max-new-tokens 10: {lengths.count(10)} of {len(lengths)}" in shown
    num_cut = sum(len(example.token_ids) > 20 for example in examples)
    assert f"conversations cut at --train.max-length 20: {num_cut}" in shown
    assert "25 to train, 2 to choose by, 3 held out" in shown and "⟦" in shown
    assert f"{len(examples)} conversations, " in shown and "answers, all turns" in shown
