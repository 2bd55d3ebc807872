"""What is trained on is what the files say."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dpace.batches.dataset import ResponseDataset
from dpace.blocks import sample_anchors
from dpace.config import PromptsConfig, Recipe, TrainConfig
from dpace.plan.lines import length_lines
from dpace.prompts.prompts import split_prompts
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
    parts = split_prompts(config)
    for examples, prompts in zip(load_examples(path, parts), parts[:2], strict=True):
        expected = [by_id[prompt.id] for prompt in prompts if prompt.id in by_id]
        assert as_rows(examples) == [(one.id, one.token_ids, one.response_spans) for one in expected]
    assert "left out: no answer" in capsys.readouterr().err
    few = split_prompts(replace(config, limit=4))
    assert len(load_examples(path, few)[0]) <= 4


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

    refuse("is not what a finished `dpace respond` wrote; run `dpace respond`", responses_sha256=None)
    refuse("other weights of the target")
    refuse('dtype "float32", not "bfloat16"', target_sha256="1")
    refuse("thinking true, not false", thinking=True)
    meta.unlink()
    with pytest.raises(ValueError, match="is not what a finished"):
        find_answers(Recipe(prompts=prompts, output=str(path.parent)), "dpace respond")


def test_a_plan_says_how_long_answers_are_and_what_is_cut(files):
    path, config = files
    examples, _ = load_examples(path, split_prompts(config))
    examples[0] = examples[0]._replace(spans=[[1, 2]])
    path.with_name("responses.meta.json").write_text('{"max_new_tokens": 10}')
    recipe = Recipe(prompts=config, output=str(path.parent), train=TrainConfig(max_length=20))
    answers = sorted(end - start for example in examples for start, end in example.spans)
    lengths = [len(example.token_ids) for example in examples]
    num_cut = sum(length > 20 for length in lengths)
    num_short = sum(length < 2 for length in answers)
    assert length_lines(examples, recipe) == [
        f"answers: {len(answers)} of {np.median(answers):.0f} tokens in the median, {answers[-1]} at most",
        f"  ending at --respond.max-new-tokens 10: {answers.count(10)}",
        f"conversations: {len(lengths)} of {np.median(lengths):.0f}, {max(lengths)} at most",
        f"  cut at --train.max-length 20: {num_cut}",
        f"  left out, without two tokens of an answer in a row: {num_short}",
    ]
    assert num_cut and num_short and answers.count(10)
