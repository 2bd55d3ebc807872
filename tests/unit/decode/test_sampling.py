"""Distributions: of the filters, of drafts with transformers' processors, and of the text that comes out."""

import itertools
from unittest.mock import Mock

import pytest
import torch
from scipy.stats import chisquare

from dpace.decode import custom_generate, generate
from dpace.decode.generation import SamplingOptions
from dpace.decode.loop import Speculation
from dpace.decode.pace import Plan
from dpace.decode.sampling import Sampler, verify_sampled
from dpace.drafter.selector import draw_draft
from dpace.drafter.vocabulary import DraftVocabulary
from tests.support.models import (
    make_drafter,
    make_target,
    make_with_candidate_selector,
    make_with_markov_head,
    make_with_selector,
)

VOCAB = 6


@pytest.mark.parametrize("filters", [{"temperature": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9}])
def test_filters_are_those_of_transformers(filters):
    """The distribution of the first token is the one that `model.generate` draws from."""
    assert Sampler(0.0).probs(torch.tensor([[1.0, 3.0, 2.0]])).tolist() == [[0, 1, 0]]
    target = make_target("qwen3")
    ids = torch.tensor([[5, 6, 7]])
    kept = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    out = target.model.generate(ids, do_sample=True, max_new_tokens=1, **kept, **{"top_k": 0, **filters})
    sampler = Sampler(**{"temperature": 1.0, **filters})
    scores = sampler.scores(target.model(ids).logits[0, -1:].detach(), [5, 6, 7])
    torch.testing.assert_close(sampler.probs(scores), out.scores[0].softmax(-1))


def test_the_overlap_is_accepted():
    """Acceptance of each slot is `sum of min(p, q)`."""
    sampler = Sampler(1.0, seed=1)
    logits = 2 * torch.randn(5, VOCAB)
    target_probs = sampler.probs(logits[2:])
    first, second = torch.minimum(sampler.probs(logits[:2]), target_probs[:2]).sum(-1).tolist()
    accepted, samples = 0, 3000
    for _ in range(samples):
        tokens, draft_probs = draw_draft(logits[:2], sampler)
        accepted += verify_sampled(tokens.tolist(), draft_probs, target_probs, sampler)[0]
    expected = first * (1 + second)
    assert abs(accepted / samples - expected) < 4 * samples**-0.5  # the number lies in 0 .. 2: deviation <= 1


def test_a_rejected_token_is_replaced_from_what_the_draft_left_over():
    """And never from all of the target's distribution: the drafter has drafted its own share already."""
    draft_probs = torch.tensor([[1.0, 0.0, 0.0]])
    target_probs = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    results = {verify_sampled([0], draft_probs, target_probs, Sampler(1.0, seed=seed)) for seed in range(40)}
    assert results == {(0, 1), (1, 2)}


def test_equal_distributions_and_a_draw_that_rounding_rejects_still_give_a_token(monkeypatch):
    probs = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]])
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.ones(count))
    assert verify_sampled([1], probs[:1], probs, Sampler(1.0, seed=0))[0] == 0


def chi_square(counts, probs):
    """p-value of counts against probabilities, rare cells together."""
    expected = probs.flatten() * counts.sum()
    common = expected >= 5
    found = torch.cat([counts.flatten()[common], counts.flatten()[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None].clamp_min(1e-9)])
    return chisquare(found, wanted * found.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize(
    "make", [make_drafter, make_with_selector, make_with_candidate_selector, make_with_markov_head]
)
def test_no_more_is_drawn_than_is_verified(make, language_target, monkeypatch):
    drawn = []
    accept = Speculation.accept
    monkeypatch.setattr(Speculation, "accept", lambda *args: drawn.append(len(args[-1])) or accept(*args))
    options = {"max_new_tokens": 12, "temperature": 1.0, "verify_rule": "speculative", "width": 3}
    assert max(generate(language_target, make(language_target), [4, 5, 6], **options).widths) == 3
    assert max(drawn) == 2


@pytest.mark.parametrize(
    ("rule", "options", "drafted"),
    [
        ("speculative", {"temperature": 6.5, "top_p": 0.9}, [1, 3]),
        pytest.param("equality", {"no_repeat_ngram_size": 2, "temperature": 7.0}, None, marks=pytest.mark.wide),
        pytest.param("equality", {"top_p": 0.8}, [1, 3], marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize("samples", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_the_text_has_the_targets_distribution(rule, options, drafted, samples, monkeypatch):
    """Chi-square of the 2nd and 3rd token against transformers' own chain of processors, for cut and whole drafts.

    Also where only some tokens, and those of the prompt, are drafted.
    """
    widths = itertools.cycle([3, 4, 2, 1])
    pace = Mock(**{"plan.return_value": Plan(is_drafted=True)})
    pace.choose_width = lambda plan, confidences: plan._replace(width=min(next(widths), len(confidences) + 1))
    monkeypatch.setattr("dpace.decode.pace.Paces.get", lambda *_: pace)
    target = make_target("qwen3", vocab_size=8, eos_token_id=None, num_hidden_layers=2)
    target.model.generation_config.eos_token_id = target.model.generation_config.pad_token_id = None
    drafter = make_drafter(target, block_size=4, num_layers=1, num_features=1, target_layer_ids=[0])
    drafter.vocabulary = DraftVocabulary(drafted) if drafted else None
    start = torch.tensor([[4, 5, 6]])
    call = {"do_sample": True, "max_new_tokens": 4, "top_k": 0, "pad_token_id": 0, "temperature": 5.0, **options}
    given = {}
    target.model.generate(start, custom_generate=lambda *args, **rest: given.update(rest) or args[1], **call)

    @torch.no_grad()
    def probs(tokens):
        ids = torch.cat([start.expand(len(tokens), -1), tokens], dim=1)
        return torch.softmax(given["logits_processor"](ids, target.model(ids).logits[:, -1].float()), -1).double()

    own = {name: value for name, value in call.items() if name in SamplingOptions.__annotations__}
    with_drafter = custom_generate(target, drafter, width="auto")
    counts = torch.zeros(8, 8, 8)
    for _ in range(samples):
        if rule == "equality":
            tokens = with_drafter(target.model, start, **given)[0, 3:].tolist()
        else:
            tokens = generate(target, drafter, start, verify_rule=rule, **own).token_ids
        counts[tuple(tokens[:3])] += 1
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    first, second, third = probs(pairs[:1, :0])[0], probs(pairs[::8, :1]), probs(pairs).view(8, 8, 8)
    expected = first[:, None, None] * second[..., None] * third
    assert not counts[expected == 0].any()
    assert chi_square(counts.sum(0), expected.sum(0)) > 0.01
