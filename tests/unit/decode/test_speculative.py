"""Speculative sampling with transformers' processors: what they see, what is accepted, and what comes out."""

import itertools
import math

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from dpace.decode import custom_generate
from dpace.decode.costs import StepCosts
from dpace.decode.pace import Plan
from dpace.decode.sampling import Sampler, block_chances, draw_draft, verify_sampled
from tests.conftest import make_drafter, make_target
from tests.unit.decode.test_decode import chi_square

VOCAB = 6
TINY = 3


class Recorder:
    """A processor that changes nothing and keeps what it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        return scores


def test_processors_see_the_tokens_that_were_drawn():
    recorder = Recorder()
    sampler = Sampler(1.0, processors=LogitsProcessorList([recorder]), seed=0)
    tokens, probs = draw_draft(torch.randn(3, VOCAB), [4, 5], sampler)
    drawn = tokens.tolist()
    assert recorder.seen == [[4, 5], [4, 5, drawn[0]], [4, 5, *drawn[:2]]] and probs.shape == (3, VOCAB)


def test_the_overlap_is_accepted():
    """Acceptance of each slot is `sum of min(p, q)` of the processed distributions, by enumeration of the first."""
    torch.manual_seed(3)
    draft_logits, target_logits, text = 2 * torch.randn(2, VOCAB), 2 * torch.randn(3, VOCAB), [2, 3]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)])
    sampler = Sampler(1.0, processors=processors, seed=1)

    def probs(logits, prefix):
        return sampler.probs(sampler.scores(logits[None], prefix))[0]

    first = torch.minimum(probs(target_logits[0], text), probs(draft_logits[0], text))
    second = [
        float(torch.minimum(probs(target_logits[1], [*text, x]), probs(draft_logits[1], [*text, x])).sum())
        for x in range(VOCAB)
    ]
    expected, accepted, samples = float(first.sum()) + sum(float(first[x]) * second[x] for x in range(VOCAB)), 0, 3000
    for _ in range(samples):
        tokens, draft_probs = draw_draft(draft_logits, text, sampler)
        draft = tokens.tolist()
        target_probs = sampler.probs(sampler.scores(target_logits, [*text, *draft]))
        accepted += verify_sampled(draft, draft_probs, target_probs, sampler)[0]
    assert abs(accepted / samples - expected) < 4 * (1 / samples) ** 0.5  # the number lies in 0 .. 2: deviation <= 1


def random_pair(num_drafts, peak):
    """Distributions of every prefix of up to `num_drafts` tokens: the drafter's, and the target's with one more."""
    prefixes = [p for n in range(num_drafts + 1) for p in itertools.product(range(TINY), repeat=n)]
    draft = {p: torch.softmax(peak * torch.randn(TINY).double(), 0) for p in prefixes}
    return draft, {p: torch.softmax(peak * torch.randn(TINY).double(), 0) for p in prefixes}


def block_reference(draft, p, q):
    """Algorithm 2 of arXiv 2403.10444, word by word: the probability of each accepted length, and what follows it."""
    h, ways, weight = [], [], 1.0
    for i in range(len(draft) + 1):
        prefix = draft[:i]
        if i:
            weight = min(weight * float(p[prefix[:-1]][prefix[-1]] / q[prefix[:-1]][prefix[-1]]), 1.0)
        if i == len(draft):
            h.append(weight)
            ways.append(p[prefix])
            continue
        rest = [max(weight * float(p[prefix][x]) - float(q[prefix][x]), 0.0) for x in range(TINY)]
        h.append(sum(rest) / (sum(rest) + 1 - weight) if sum(rest) + 1 - weight else 1.0)
        ways.append(torch.tensor(rest).double() / sum(rest) if sum(rest) else p[prefix])
    h[0] = 1.0  # nothing accepted is always possible
    longer, lengths = 1.0, []
    for chance in reversed(h):
        lengths.append(longer * chance)
        longer *= 1 - chance
    return lengths[::-1], ways


@pytest.mark.parametrize(("num_drafts", "peak"), [(1, 1.0), (2, 2.0), (3, 1.0), (3, 0.0)])
def test_a_block_has_the_targets_distribution_and_accepts_no_less(num_drafts, peak):
    """Exactly, by enumeration of all drafts and of what is drawn after them; and as the paper's algorithm."""
    torch.manual_seed(num_drafts)
    q, p = random_pair(num_drafts, peak)
    if not peak:
        p = q  # the same distributions: all is accepted
    found = torch.zeros([TINY] * (num_drafts + 1)).double()
    expected_length, token_length = 0.0, 0.0
    for draft in itertools.product(range(TINY), repeat=num_drafts):
        chance_of_draft = math.prod(float(q[draft[:i]][x]) for i, x in enumerate(draft))
        draft_probs = torch.stack([q[draft[:i]] for i in range(num_drafts)])
        target_probs = torch.stack([p[draft[:i]] for i in range(num_drafts + 1)])
        ratios = [float(p[draft[:i]][x] / q[draft[:i]][x]) for i, x in enumerate(draft)]
        chances, weights = block_chances(ratios, draft_probs, target_probs)
        lengths, ways = block_reference(draft, p, q)
        longer = 1.0
        for accepted in range(num_drafts, -1, -1):
            chance = 1.0 if accepted == 0 else chances[accepted - 1]
            chance = 1.0 if math.isnan(chance) else chance
            share, longer = longer * chance, longer * (1 - chance)
            assert share == pytest.approx(lengths[accepted], abs=1e-6)
            rest = (weights[accepted] * target_probs[accepted] - q[draft[:accepted]]).clamp_min(0)
            follow = rest / rest.sum() if accepted < num_drafts and rest.any() else target_probs[accepted]
            assert share < 1e-6 or torch.allclose(follow, ways[accepted], atol=1e-5)
            expected_length += chance_of_draft * share * accepted
            rest_of_text = follow
            for prefix_length in range(accepted + 1, num_drafts + 1):  # the target goes on by itself
                texts = itertools.product(range(TINY), repeat=prefix_length - accepted)
                tails = torch.stack([p[draft[:accepted] + text] for text in texts])
                rest_of_text = rest_of_text.flatten()[:, None] * tails
            found[draft[:accepted]] += chance_of_draft * share * rest_of_text.reshape(found[draft[:accepted]].shape)
        token_length += chance_of_draft * sum(itertools.accumulate((min(1.0, r) for r in ratios), lambda a, b: a * b))
    for text in itertools.product(range(TINY), repeat=num_drafts + 1):
        of_target = math.prod(float(p[text[:i]][x]) for i, x in enumerate(text))
        assert float(found[text]) == pytest.approx(of_target, abs=1e-5)
    assert expected_length >= token_length - 1e-6
    assert (expected_length > token_length + 1e-3) is (num_drafts > 1 and peak > 0)


def test_a_later_token_saves_an_earlier_one():
    """Draws decide as the chances say: the longest accepted beginning counts."""
    q = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    p = torch.tensor([[0.4, 0.6], [0.1, 0.9], [0.5, 0.5]])
    lengths = [verify_sampled([0, 1], q, p, Sampler(1.0, seed=seed), by_block=True)[0] for seed in range(400)]
    assert lengths.count(2) == 400, "0.8 x 9 is above 1: the second token makes up for the first"
    token = [verify_sampled([0, 1], q, p, Sampler(1.0, seed=seed))[0] for seed in range(400)]
    assert 40 < token.count(0) < 120


def test_equal_distributions_and_a_draw_that_rounding_rejects_still_give_a_token(monkeypatch):
    probs = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]])
    sampler = Sampler(1.0, seed=0)
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.ones(count))
    assert verify_sampled([1], probs[:1], probs, sampler)[0] == 0
    assert verify_sampled([1], probs[:1], probs, sampler, by_block=True)[0] == 0


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"no_repeat_ngram_size": 2, "temperature": 1.3}, [3, 2, 1]),
        pytest.param({"repetition_penalty": 1.8}, [2, 1, 3], marks=pytest.mark.slow),
        pytest.param({"top_k": 4}, [1], marks=pytest.mark.slow),
    ],
)
def test_generate_with_processors_has_the_targets_distribution(options, widths, monkeypatch):
    """Chi-square of the 2nd and 3rd token against transformers' own chain of processors, for cut and whole drafts."""
    monkeypatch.setattr("dpace.decode.pace.measure_costs", lambda *_, **__: StepCosts([1.0, 1.01, 1.02, 1.03], 0.1))
    cycle = itertools.cycle(widths)
    monkeypatch.setattr("dpace.decode.pace.Pace.plan", lambda *_: Plan(is_drafted=True))
    monkeypatch.setattr(
        "dpace.decode.pace.Pace.choose_width", lambda _, plan, confidences: (min(next(cycle), len(confidences) + 1), 0)
    )
    monkeypatch.setattr("dpace.decode.pace.Pace.learn_drafting", lambda *_, **__: None)
    target = make_target("qwen3", vocab_size=8, eos_token_id=None, num_hidden_layers=3)
    target.model.generation_config.eos_token_id = target.model.generation_config.pad_token_id = None
    with torch.no_grad():
        target.model.get_output_embeddings().weight.mul_(0.2)
    drafter = make_drafter(target, block_size=4, num_layers=1, num_features=1)
    start, samples = [4, 5, 6], 300
    counts = torch.zeros(8, 8, 8)
    torch.manual_seed(0)
    with_drafter = custom_generate(target, drafter, verify_rule="speculative", width="auto")
    call = {"do_sample": True, "max_new_tokens": 4, "top_k": 0, "pad_token_id": 0, **options}
    chain = {}

    def generate(**more):
        return target.model.generate(
            torch.tensor([start]), attention_mask=torch.ones(1, 3, dtype=torch.long), **call, **more
        )

    def keep(model, input_ids, logits_processor, **_):
        chain["processors"] = logits_processor
        return input_ids

    generate(custom_generate=keep)
    for _ in range(samples):
        out = generate(custom_generate=with_drafter)[0, 3:].tolist()
        counts[out[0], out[1], out[2]] += 1

    def probs(prefix):
        ids = torch.tensor([prefix])
        with torch.no_grad():
            logits = target.model(ids).logits[:, -1].float()
        return torch.softmax(chain["processors"](ids, logits), -1)[0].double()

    expected = torch.zeros(8, 8, 8, dtype=torch.double)
    first = probs(start)
    for a in range(8):
        second = probs([*start, a])
        for b in range(8):
            expected[a, b] = first[a] * second[b] * probs([*start, a, b]) if first[a] * second[b] > 0 else 0
    assert not counts[expected == 0].any()
    assert chi_square(counts.sum(0), expected.sum(0)) > 0.01
