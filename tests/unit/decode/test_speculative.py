"""Speculative sampling with transformers' processors: what they see, what is accepted, and what comes out."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from dpace.decode import custom_generate
from dpace.decode.costs import StepCosts
from dpace.decode.pace import Plan
from dpace.decode.sampling import Sampler, verify_sampled
from dpace.drafter.selector import draw_draft
from tests.conftest import make_drafter, make_target
from tests.unit.decode.test_decode import chi_square

VOCAB = 6


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


def test_equal_distributions_and_a_draw_that_rounding_rejects_still_give_a_token(monkeypatch):
    probs = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]])
    sampler = Sampler(1.0, seed=0)
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.ones(count))
    assert verify_sampled([1], probs[:1], probs, sampler)[0] == 0


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
    monkeypatch.setattr("dpace.decode.pace.Pace.plan", lambda *_, **__: Plan(is_drafted=True))
    monkeypatch.setattr(
        "dpace.decode.pace.Pace.choose_width",
        lambda _, plan, confidences: plan._replace(width=min(next(cycle), len(confidences) + 1)),
    )
    monkeypatch.setattr("dpace.decode.pace.Pace.learn", lambda *_, **__: None)
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
