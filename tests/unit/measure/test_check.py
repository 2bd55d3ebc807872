"""The checks pass where they should, and fail for each kind of bug that they are for."""

import copy
import json
import operator
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import dpace.decode.loop
from dpace.batches.dataset import ResponseDataset
from dpace.config import RespondConfig
from dpace.decode import generate_batch
from dpace.drafter.vocabulary import DraftVocabulary
from dpace.measure.check import check, check_distribution, uniformity
from dpace.measure.own_text import check_responses, greedy_share, read_greedy
from dpace.prompts.prompts import Prompt
from dpace.respond.answering import write_responses
from dpace.target import Target
from dpace.target.chat import encode_chat
from tests.support.cases import wide
from tests.support.files import change_json, make_prompts, write_prompts, write_rows
from tests.support.models import (
    EOS,
    VOCAB,
    make_drafter,
    make_target,
    make_with_candidate_selector,
    make_with_markov_head,
    make_with_selector,
)


@pytest.fixture
def prompts(language_prompts) -> list[Prompt]:
    return make_prompts(language_prompts[50:])


def failed(findings) -> list[str]:
    return [finding.name for finding in findings if not finding.is_passed]


def test_a_trained_and_an_untrained_drafter_pass(language_target, language_drafter, prompts):
    """The untrained one with a draft vocabulary."""
    findings = check(language_target, language_drafter, prompts[:1], max_new_tokens=12)
    assert not failed(findings) and len(findings) == 8
    assert [f.detail for f in findings[:3]] == [f"{n} of {n} texts equal" for n in (1, 6, 5)]
    untrained = make_drafter(language_target)
    untrained.vocabulary = DraftVocabulary(range(30))
    assert not failed(check(language_target, untrained, prompts[:1], max_new_tokens=12))


@pytest.mark.parametrize(
    "make", wide([make_with_selector, make_with_candidate_selector, make_with_markov_head], make_with_markov_head)
)
def test_a_drafter_with_a_head_passes(make, language_target, prompts):
    """Greedy walks at every width and in a batch, draws from the walk, and accepted lengths of both views."""
    drafter = make(language_target, block_size=5)
    assert not failed(check(language_target, drafter, prompts[:3], max_new_tokens=20))


def test_the_share_of_greedy_tokens(language_target, language_responses):
    """The target's own answers are all greedy; of answers to other prompts, few tokens are."""
    own = language_responses[:20]
    others = [
        replace(one, token_ids=other.token_ids[:4] + one.token_ids[4:])
        for one, other in zip(own, language_responses[1:], strict=False)
    ]
    sets = [ResponseDataset(rows, max_length=64, num_anchors=None, seed=0) for rows in (own, others)]
    shares = [greedy_share(language_target, dataset) for dataset in sets]
    assert shares[0] > 0.99 and shares[1] < 0.9


def spoil(function):
    """Make a way of decoding write another token."""

    def spoilt(*args, **options):
        found = function(*args, **options)
        for generation in found if isinstance(found, list) else [found]:
            generation.token_ids[3] = (generation.token_ids[3] + 1) % 64
        return found

    return spoilt


def accept_more(verify):
    return lambda draft, own: min(len(draft), verify(draft, own) + 1)


FAULTS = {
    "dpace.decode.loop.verify_draft": (accept_more, "accepted lengths in training are those of decoding", "histograms"),
    "dpace.measure.check.generate_plain": (spoil, "plain decoding is generate of transformers", "decoding, token 3"),
    "dpace.measure.check.generate_batch": (spoil, "text at temperature 0", "batch, token 3"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, language_target, language_drafter, prompts, monkeypatch):
    """The baseline is wrong as where `respond` once took over the target's penalties."""
    change, expected, where = FAULTS[name]
    monkeypatch.setattr(name, change(operator.attrgetter(name.removeprefix("dpace."))(dpace)))
    findings = check(language_target, language_drafter, prompts[:1], max_new_tokens=12)
    assert expected in failed(findings)
    assert where in next(finding.detail for finding in findings if finding.name == expected)


def test_another_distribution_is_found(language_target, language_drafter, prompts, monkeypatch):
    def keep_all(draft, draft_probs, target_probs, sampler):
        return len(draft), int(target_probs[len(draft)].argmax())

    monkeypatch.setattr(dpace.decode.loop, "verify_sampled", keep_all)
    encoded = [encode_chat(language_target, prompt.turns[0]) for prompt in prompts]
    found = check_distribution(language_target, language_drafter, encoded, max_new_tokens=24, seed=0)
    assert failed(found) == ["distribution, rule speculative"]


def test_only_the_text_is_checked_in_bf16(prompts, language_target):
    target = Target(make_target("smollm2").model.to(torch.bfloat16), language_target.tokenizer)
    drafter = make_drafter(target).to(torch.bfloat16)
    findings = check(target, drafter, prompts[:1], max_new_tokens=12)
    names = ["plain decoding is generate of transformers", "text at temperature 0", "text at temperature 1, same seed"]
    assert [finding.name for finding in findings] == names
    assert not failed(findings), findings


def test_the_p_value_is_that_of_scipy():
    values = torch.rand(400, 2)
    counts = np.histogramdd(values.numpy(), 4, [(0, 1)] * 2)[0]
    assert uniformity(values, 4) == pytest.approx(chisquare(counts.ravel()).pvalue)
    assert uniformity(values[:0], 4) == 1


def test_the_verb(language_folder, language_target, language_prompts, run_line, tmp_path, monkeypatch):
    make_drafter(language_target).save_pretrained(tmp_path / "drafter")
    path = write_prompts(tmp_path / "prompts.jsonl", language_prompts[50:52])
    answers = tmp_path / "r.jsonl"
    write_responses(language_target, make_prompts(language_prompts[50:52]), answers, RespondConfig(max_new_tokens=6))
    ask = f"check --target {language_folder} --drafter {tmp_path / 'drafter'} --prompts {path} --responses {answers}"
    ask += " --num-prompts 1 --max-new-tokens 6"
    assert [line.split()[:1] for line in run_line(ask).out.splitlines()].count(["pass"]) == 9
    change_json(tmp_path / "r.meta.json", target_sha256="0" * 64)
    assert "with other weights of the target (sha256 000000000000, not" in run_line(ask, 1).err
    change_json(tmp_path / "r.meta.json", target_sha256=language_target.sha256, max_new_tokens=7)
    monkeypatch.setattr("dpace.measure.check.generate_batch", spoil(generate_batch))
    said = run_line(ask, 1).err
    assert "failed: responses are the target's greedy text (float32); text at temperature 0 (float32)" in said
    broken = Mock(side_effect=ValueError("no batch here"))
    monkeypatch.setattr("dpace.measure.check.generate_batch", broken)
    assert "dpace check: no batch here" in run_line(ask, 1).err, "a batch that fails is no check that passed"


SPOILT = {
    "another token": lambda answer: [*answer[:2], answer[2] + 1, *answer[3:]],
    "cut": lambda answer: answer[:-2],
    "past the end": lambda answer: [answer[0], EOS, *answer[2:]],
}


@pytest.mark.parametrize("change", [None, *SPOILT])
def test_kept_responses_are_read_again(change, language_target, prompts, tmp_path):
    path = tmp_path / "responses.jsonl"
    write_responses(language_target, prompts, path, RespondConfig(max_new_tokens=12))
    responses, meta = read_greedy(path)
    for number, response in enumerate(responses if change else ()):
        ((start, end),) = response.response_spans
        token_ids = response.token_ids[:start] + SPOILT[change](response.token_ids[start:end])
        responses[number] = replace(response, token_ids=token_ids, response_spans=[[start, len(token_ids)]])
    finding = check_responses(language_target, responses, meta)
    assert finding.is_passed is not bool(change) and ("NOT A TIE" in finding.detail) is bool(change)


@pytest.mark.parametrize("is_spoilt", [False, True])
def test_a_token_after_a_tie_is_checked_too(is_spoilt, language_target, prompts, tmp_path):
    """An answer begins with a token that has the same rows of the tables as the target's own."""
    path = tmp_path / "responses.jsonl"
    target = Target(copy.deepcopy(language_target.model), language_target.tokenizer)
    write_responses(target, prompts[:1], path, RespondConfig(max_new_tokens=12))
    (response,), meta = read_greedy(path)
    start, _ = response.response_spans[0]
    twin = VOCAB - 1
    own = response.token_ids[start]
    with torch.no_grad():
        for table in (target.model.get_input_embeddings(), target.model.get_output_embeddings()):
            table.weight[twin] = table.weight[own]
    response.token_ids[start] = twin
    if is_spoilt:
        response.token_ids[start + 3] = (response.token_ids[start + 3] + 1) % VOCAB
    finding = check_responses(target, [response], meta | {"target_sha256": target.sha256})
    assert finding.is_passed is not is_spoilt and ("token 3" in finding.detail) is is_spoilt, finding.detail


def test_only_greedy_responses_can_be_read_again(tmp_path):
    path = tmp_path / "responses.jsonl"
    write_rows(path, [{"id": "a", "set": "s", "messages": [], "token_ids": [1], "response_spans": []}])
    with pytest.raises(ValueError, match="no meta file beside it"):
        read_greedy(path)
    meta = {"temperature": 0.5, "max_new_tokens": 2, "dtype": "float32", "target_sha256": "0"}
    path.with_name("responses.meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="temperature 0.5, and only the target's"):
        read_greedy(path)
