"""The floor of the rejections is exact where it is known, and lies between its two ends where it is estimated."""

import itertools
from dataclasses import replace

import numpy as np
import torch
from explain import Options, explain_prompt, fit_blind, rejections, score_block

from dpace.decode import generate

OPTIONS = Options("target", "drafter", num_blocks=3, num_samples=4, max_new_tokens=12)


def test_no_other_distribution_is_rejected_less():
    probs = torch.rand(5, 3).softmax(-1)
    weights = torch.rand(5)
    best = fit_blind(probs, weights)
    assert torch.allclose(best.sum(), torch.ones(()))
    steps = 40
    others = [torch.tensor([i, j, steps - i - j]) / steps for i in range(steps + 1) for j in range(steps + 1 - i)]
    rejected = [rejections(probs, other, weights) for other in others]
    least = rejections(probs, best, weights)
    assert min(rejected) >= least - 1e-6 and min(rejected) <= least + 0.1


def test_a_text_that_ended_reaches_no_slot():
    """Half of the texts end with the first of two slots, of which all drafts are right."""
    probs = torch.tensor([1.0, 0.0]).expand(8, 2, -1)
    tokens = torch.zeros(8, 2, dtype=torch.long)
    is_end = tokens.bool()
    is_end[:4, 0] = True
    assert score_block(probs, probs, tokens, is_end)[0].tolist() == [1.0, 0.5]


def test_the_floor_of_a_chain_lies_between_its_ends():
    """All paths with their probabilities give the exact floor; few samples of them give bounds."""
    num_tokens, num_slots = 5, 3
    generator = torch.Generator().manual_seed(1)
    start = torch.rand(num_tokens, generator=generator).softmax(-1)
    then = (3 * torch.randn(num_tokens, num_tokens, generator=generator)).softmax(-1)
    own = torch.randn(num_slots, num_tokens, generator=generator).softmax(-1)

    def probs_of(paths):
        return torch.stack([start.expand(len(paths), -1), then[paths[:, 0]], then[paths[:, 1]]], 1)

    def measure(num_samples):
        paths = torch.multinomial(own, num_samples, replacement=True).T
        drafted = own.expand(num_samples, -1, -1)
        return score_block(probs_of(paths), drafted, paths, torch.zeros_like(paths).bool())

    paths = torch.tensor(list(itertools.product(range(num_tokens), repeat=num_slots)))
    probs = probs_of(paths)
    weights = torch.ones(len(paths))
    exact = np.zeros((2, num_slots))
    for slot in range(num_slots):
        # The chance of a path up to here, accepted as it is drafted, spread over what comes behind it.
        shares = weights / num_tokens ** (num_slots - slot)
        fitted = fit_blind(probs[:, slot], shares)
        exact[:, slot] = [rejections(probs[:, slot], q, shares) for q in (own[slot], fitted)]
        true = probs[:, slot].gather(1, paths[:, slot, None])[:, 0]
        drafts = own[slot][paths[:, slot]]
        weights = weights * torch.minimum(true, drafts)
    reached, rejected, low, high = np.mean([measure(8) for _ in range(100)], 0)
    assert np.allclose(rejected, exact[0], atol=0.03) and reached[0] == 1
    assert (low <= exact[1] + 0.01).all() and (high >= exact[1] - 0.01).all() and high[1] - low[1] > 0.01
    assert np.allclose(measure(4000)[1:], [exact[0], exact[1], exact[1]], atol=0.03)


def test_greedy_rejections_are_those_of_decoding(language_target, language_drafter, questions):
    """At temperature 0 each block is rejected where decoding rejects it, and nothing of it is unavoidable."""
    options = replace(OPTIONS, temperature=0.0, num_blocks=99, num_samples=2, max_new_tokens=16)
    for token_ids in questions[:3]:
        found = explain_prompt(language_target, language_drafter, token_ids, options, seed=0)
        answer = generate(language_target, language_drafter, token_ids, width="full", max_new_tokens=16)
        assert len(found) == len(answer.accepted_lengths) > 1
        assert not found[:, 2:].any()
        for (reached, rejected, *_), accepted in list(zip(found, answer.accepted_lengths, strict=True))[:-1]:
            assert reached.tolist() == [float(slot <= accepted) for slot in range(len(reached))]
            assert rejected.tolist() == [float(slot == accepted) for slot in range(len(reached))]
