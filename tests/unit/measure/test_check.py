"""The checks pass where they should, and fail for each kind of bug that they are for."""

import copy
import operator
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import dpace.decode.loop
from dpace.batches.dataset import ResponseDataset
from dpace.decode import generate_batch, generate_plain
from dpace.drafter.vocabulary import DraftVocabulary
from dpace.measure.check import Question, check, check_distribution, uniformity
from dpace.measure.own_text import find_divergence, greedy_share
from dpace.prompts.prompts import Prompt
from dpace.target import Target
from dpace.target.chat import encode_chat
from tests.support.cases import wide
from tests.support.files import make_prompts, write_prompts
from tests.support.models import (
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
    questions = []
    for number, prompt in enumerate(prompts):
        questions.append(Question(prompt.id, encode_chat(language_target, prompt.turns[0]), number))
    found = check_distribution(language_target, language_drafter, questions, max_new_tokens=24)
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
    ask = f"check --target {language_folder} --drafter {tmp_path / 'drafter'} --prompts {path}"
    ask += " --num-prompts 1 --max-new-tokens 6"
    assert [line.split()[:1] for line in run_line(ask).out.splitlines()].count(["pass"]) == 8
    monkeypatch.setattr("dpace.measure.check.generate_batch", spoil(generate_batch))
    assert "failed: text at temperature 0 (float32)" in run_line(ask, 1).err
    broken = Mock(side_effect=ValueError("no batch here"))
    monkeypatch.setattr("dpace.measure.check.generate_batch", broken)
    assert "dpace check: no batch here" in run_line(ask, 1).err, "a batch that fails is no check that passed"


@pytest.mark.parametrize("is_twin", [True, False])
def test_a_tie_is_told_from_a_bug(is_twin, language_target, questions):
    """A twin has the same rows of the tables as the target's own token."""
    target = Target(copy.deepcopy(language_target.model), language_target.tokenizer)
    own = generate_plain(target, questions[0], max_new_tokens=4).token_ids
    twin = VOCAB - 1
    if is_twin:
        with torch.no_grad():
            for table in (target.model.get_input_embeddings(), target.model.get_output_embeddings()):
                table.weight[twin] = table.weight[own[1]]
        target.refresh_copies()
    divergence = find_divergence(target, "here", questions[0], [own[0], twin, *own[2:]], own)
    assert divergence.is_tie is is_twin and divergence.line.startswith("here, token 1: ")
    assert divergence.line.endswith(": tie" if is_twin else ": NOT A TIE")
