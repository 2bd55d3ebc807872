"""The floor of the rejections is exact where it is known, and lies between its two ends where it is estimated."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import dpace.measure.floor as floor
from dpace.config import ExplainConfig
from dpace.decode import generate
from dpace.decode.sampling import Sampler
from dpace.drafter.vocabulary import PackedRows
from dpace.measure.floor import draw_continuations, explain_prompt, fit_blind, score_block
from dpace.measure.results import read_results
from tests.support.files import write_prompts, write_rows
from tests.support.models import (
    make_drafter,
    make_with_candidate_selector,
    make_with_markov_head,
    make_with_selector,
)

CONFIG = ExplainConfig(target="target", drafter="drafter", num_blocks=3, num_samples=4, max_new_tokens=12)


@pytest.mark.parametrize("is_drawn", [True, False])
def test_no_other_distribution_is_rejected_less(is_drawn):
    probs = torch.rand(5, 3).softmax(-1)
    weights = torch.rand(5)
    best = fit_blind(probs, weights, is_drawn=is_drawn)
    assert torch.allclose(best.sum(), torch.ones(()))
    steps = 40 if is_drawn else 1
    others = [torch.tensor([i, j, steps - i - j]) / steps for i in range(steps + 1) for j in range(steps + 1 - i)]
    rejected = [floor.rejections(probs, other, weights) for other in others]
    least = floor.rejections(probs, best, weights)
    assert min(rejected) >= least - 1e-6 and min(rejected) <= least + 0.1 * is_drawn + 1e-6


def test_a_text_that_ended_reaches_no_slot():
    """Half of the texts end with the first of two slots, of which all drafts are right."""
    probs = torch.tensor([1.0, 0.0]).expand(8, 2, -1)
    tokens = torch.zeros(8, 2, dtype=torch.long)
    is_end = tokens.bool()
    is_end[:4, 0] = True
    assert score_block(probs, probs, tokens, is_end, is_drawn=True)[0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("is_drawn", [True, False])
def test_the_floor_of_a_chain_lies_between_its_ends(is_drawn):
    """All paths with their probabilities give the exact floor; few samples of them give bounds."""
    num_tokens, num_slots = 5, 3
    generator = torch.Generator().manual_seed(1)
    start = torch.rand(num_tokens, generator=generator).softmax(-1)
    then = (3 * torch.randn(num_tokens, num_tokens, generator=generator)).softmax(-1)
    own = torch.randn(num_slots, num_tokens, generator=generator).softmax(-1)
    if not is_drawn:
        own = torch.nn.functional.one_hot(own.argmax(-1), num_tokens).float()

    def probs_of(paths):
        return torch.stack([start.expand(len(paths), -1), then[paths[:, 0]], then[paths[:, 1]]], 1)

    def measure(num_samples):
        paths = torch.multinomial(start.expand(num_samples, -1), 1)
        while paths.shape[1] < num_slots:
            paths = torch.cat([paths, torch.multinomial(then[paths[:, -1]], 1)], 1)
        drafted = own.expand(num_samples, -1, -1)
        return score_block(probs_of(paths), drafted, paths, torch.zeros_like(paths).bool(), is_drawn=is_drawn)

    paths = torch.tensor(list(itertools.product(range(num_tokens), repeat=num_slots)))
    probs = probs_of(paths)
    weights = torch.ones(len(paths))
    exact = np.zeros((2, num_slots))
    for slot in range(num_slots):
        # The chance of a path up to here, accepted as it is drafted, spread over what comes behind it.
        shares = weights / num_tokens ** (num_slots - slot)
        fitted = fit_blind(probs[:, slot], shares, is_drawn=is_drawn)
        exact[:, slot] = [floor.rejections(probs[:, slot], q, shares) for q in (own[slot], fitted)]
        true = probs[:, slot].gather(1, paths[:, slot, None])[:, 0]
        drafts = own[slot][paths[:, slot]]
        weights = weights * (torch.minimum(true, drafts) if is_drawn else true * drafts)
    reached, rejected, low, high = np.mean([measure(8) for _ in range(100)], 0)
    assert np.allclose(rejected, exact[0], atol=0.03) and reached[0] == 1
    assert (low <= exact[1] + 0.01).all() and (high >= exact[1] - 0.01).all() and high[1] - low[1] > 0.01
    assert np.allclose(measure(4000)[1:], [exact[0], exact[1], exact[1]], atol=0.03)


def test_greedy_rejections_are_those_of_decoding(language_target, language_drafter, questions):
    """At temperature 0 each block is rejected where decoding rejects it, and nothing of it is unavoidable."""
    config = replace(CONFIG, temperature=0.0, num_blocks=99, num_samples=2, max_new_tokens=16)
    for token_ids in questions[:3]:
        found = explain_prompt(language_target, language_drafter, token_ids, config, seed=0)
        answer = generate(language_target, language_drafter, token_ids, width="full", max_new_tokens=16)
        assert len(found) == len(answer.accepted_lengths) > 1
        assert not found[:, 2:].any()
        for (reached, rejected, *_), accepted in list(zip(found, answer.accepted_lengths, strict=True))[:-1]:
            assert reached.tolist() == [float(slot <= accepted) for slot in range(len(reached))]
            assert rejected.tolist() == [float(slot == accepted) for slot in range(len(reached))]


def test_a_head_is_explained_too(language_target, questions):
    """Its drafts are drawn one after the other, and its first slot is reached always."""
    drafter = make_with_selector(language_target, block_size=5)
    found = explain_prompt(language_target, drafter, questions[0], CONFIG, seed=0)
    assert np.allclose(found[:, 0, 0], 1)
    assert (found[:, 1] <= found[:, 0] + 1e-6).all()


def test_continuations_have_the_distribution_of_their_text(language_target, questions):
    sampler = Sampler(1.0, seed=0)
    tokens, probs = draw_continuations(language_target, questions[0], 3, 4, sampler)
    for row, own in zip(tokens.tolist(), probs, strict=True):
        hidden = language_target.hidden(torch.tensor([[*questions[0], *row[:-1]]]))[0, -4:]
        assert torch.allclose(own, sampler.probs(sampler.scores(language_target.logits(hidden), ())), atol=1e-4)


@pytest.mark.parametrize(
    "make", [make_drafter, make_with_selector, make_with_candidate_selector, make_with_markov_head]
)
def test_chances_are_those_that_drafts_are_drawn_from(language_target, questions, make):
    drafter = make(language_target, block_size=5)
    rows = PackedRows(language_target, drafter.vocabulary, questions[0])
    hidden = torch.randn(1, 5, language_target.hidden_size)
    before = torch.randn(1, language_target.hidden_size)
    sampler = Sampler(0.7, seed=0)
    with torch.no_grad():
        draft = drafter.selector.propose(rows, hidden, torch.tensor(questions[0][-1:]), lambda: before, 5)
        drawn = [draft.draw(4, questions[0], sampler) for _ in range(3)]
        chances = draft.chances(torch.stack([tokens for tokens, _ in drawn]), sampler)
    assert torch.allclose(chances, torch.stack([probs for _, probs in drawn]), atol=1e-6)


def test_the_command_says_where_tau_is_lost_and_goes_on(
    language_folder, random_drafter_folder, language_prompts, run_line, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", language_prompts[50:57])
    ask = f"explain --target {language_folder} --drafter {random_drafter_folder} --prompts prompts.jsonl"
    ask += " --num-blocks 2 --num-samples 4"
    whole = f"{ask} --num-prompts 6 --max-new-tokens 8"
    shown = run_line(whole).out
    assert "most rejections are the drafter's own" in shown and "explain.json" in shown
    folder = tmp_path / "dpace-explain"
    results = read_results(folder / "explain.json")
    (kept,) = folder.glob("explain-*.jsonl")
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:-2]))
    run_line(whole)
    assert len(kept.read_text().splitlines()) == 1 + 6, "only the two that were lost are measured again"
    assert read_results(folder / "explain.json") == results and results.num_samples == 4
    run_line("report dpace-explain")
    assert "Where tau is lost" in (folder / "report.html").read_text()
    ask += " --num-prompts 2 --max-new-tokens"
    for temperature in ("0", "1e-40"):
        assert "100 to 100 %" in run_line(f"{ask} 8 --temperature {temperature} --output {temperature}").out
    assert "nothing was rejected" in run_line(f"{ask} 1 --output one").out
    sets = [{"prompt": prompt, "set": name} for prompt, name in zip(language_prompts[50:], ("all", "s"), strict=False)]
    write_rows(tmp_path / "prompts.jsonl", sets)
    run_line(f"{ask} 8 --output sets")
    rows = {row.set: row.num_prompts for row in read_results(tmp_path / "sets" / "explain.json").rows}
    assert rows == {"all": 1, "s": 1, "all sets": 2}
