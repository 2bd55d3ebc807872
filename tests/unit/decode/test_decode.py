import itertools

import pytest
import torch
from scipy.stats import chisquare

from dpace.decode import Paces, generate, generate_plain
from dpace.decode.copies import Copy
from dpace.decode.costs import StepCosts
from dpace.decode.pace import Plan
from dpace.decode.sampling import Sampler
from dpace.drafter.vocabulary import DraftVocabulary
from tests.conftest import Oracle, make_drafter, make_target
from tests.support.cases import wide


def prompt(length=7, seed=0):
    return torch.randint(4, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("block_size", wide([2, 3, 5, 8], 5))
def test_greedy_text_is_the_targets(random_target, block_size):
    drafter = make_drafter(random_target, block_size=block_size)
    own = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = random_target.model.generate(torch.tensor([prompt()]), **own)[0, 7:].tolist()
    options = {"max_new_tokens": 20, "stop_token_ids": []}
    assert generate_plain(random_target, prompt(), **options).token_ids == plain
    for width in ("full", 2, "auto"):
        assert generate(random_target, drafter, prompt(), width=width, **options).token_ids == plain


@pytest.fixture
def oracle(monkeypatch):
    """Make a target, a drafter that drafts its text with faults, and 60 tokens of that text."""

    def make(is_wrong, confidence=0.99, **options):
        target = make_target("qwen3")
        drafter = make_drafter(target, **options)
        plain = generate_plain(target, prompt(), max_new_tokens=60, stop_token_ids=[]).token_ids
        Oracle(monkeypatch, drafter, target, prompt() + plain, is_wrong, confidence)
        return target, drafter, plain

    return make


@pytest.mark.parametrize(
    ("is_wrong", "expected"),
    [
        (lambda n: False, [3, 3, 3, 3, 3]),
        (lambda n: True, [0] * 20),
        (lambda n: n % 3 == 2, [2, 2, 2, 2, 2, 2, 2]),
    ],
    ids=["always", "never", "sometimes"],
)
def test_fake_drafters(is_wrong, expected, oracle):
    target, drafter, plain = oracle(is_wrong)
    ours = generate(target, drafter, prompt(), max_new_tokens=21, stop_token_ids=[], width="full")
    assert ours.token_ids == plain[:21]
    assert ours.accepted_lengths[: len(expected) - 1] == expected[:-1]
    assert sum(ours.emitted_lengths) == 20


@pytest.mark.parametrize("end", range(1, 9))
@pytest.mark.parametrize("has_stop", [True, False], ids=["stop token", "length limit"])
def test_a_text_that_ends_inside_a_block(has_stop, end, oracle):
    target, drafter, plain = oracle(lambda n: False)
    options = {"max_new_tokens": end, "stop_token_ids": []}
    if has_stop:
        options = {"max_new_tokens": 20, "stop_token_ids": [plain[end]]}
        end = plain.index(plain[end]) + 1
    ours = generate(target, drafter, prompt(), width="full", **options)
    assert ours.token_ids == plain[:end] == generate_plain(target, prompt(), **options).token_ids
    assert sum(ours.emitted_lengths) == end - 1 == ours.acceptance.emitted_tokens.sum()


def chi_square(counts, probs):
    """p-value of counts against probabilities, rare cells together."""
    expected = probs.flatten().double() * counts.sum()
    common = expected >= 5
    found = torch.cat([counts.flatten()[common], counts.flatten()[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None].clamp_min(1e-9)])
    return chisquare(found, wanted * found.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize(
    ("rule", "width", "filters", "drafted"),
    [
        ("equality", "auto", {"temperature": 1.4, "top_p": 0.8}, None),
        pytest.param("speculative", "full", {}, None, marks=pytest.mark.wide),
        pytest.param("speculative", "auto", {"top_k": 3}, None, marks=pytest.mark.wide),
        pytest.param("equality", "full", {}, [1, 3], marks=pytest.mark.wide),
        pytest.param("speculative", "full", {}, [1, 3], marks=pytest.mark.wide),
        pytest.param("speculative", "auto", {"top_p": 0.9}, [1, 3], marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize("samples", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_output_distribution_when_sampling(rule, width, filters, drafted, samples, monkeypatch):
    """Chi-square of the joint distribution of the 2nd and 3rd token against the target's, on a tiny vocabulary.

    Also where only some tokens, and those of the prompt, are drafted.
    """
    monkeypatch.setattr("dpace.decode.pace.measure_costs", lambda *_, **__: StepCosts([1.0, 1.01, 1.02, 1.03], 0.1))
    # Steps do not take these seconds.
    monkeypatch.setattr("dpace.decode.pace.Pace._learn_seconds", lambda *_, **__: None)
    monkeypatch.setattr("dpace.decode.pace.EXPLORATION", 1.0)  # so that there are drafts
    target = make_target("qwen3", vocab_size=8, eos_token_id=None, num_hidden_layers=4)
    with torch.no_grad():
        target.model.get_output_embeddings().weight.mul_(0.2)
    target.refresh_copies()
    drafter = make_drafter(target, block_size=4, num_layers=1, num_features=1)
    drafter.vocabulary = DraftVocabulary(drafted) if drafted else None
    start, temperature = [4, 5, 6], filters.get("temperature", 1.0)
    sampler = Sampler(**{"temperature": 1.0, **filters})

    def probs(tokens):
        with torch.no_grad():
            return sampler.probs(sampler.scores(target.model(torch.tensor([tokens])).logits[0, -1:], tokens))[0]

    first = probs(start)
    joint = torch.stack([first[t] * probs([*start, t]) for t in range(8)])
    third = torch.stack([torch.stack([joint[a, b] * probs([*start, a, b]) for b in range(8)]) for a in range(8)]).sum(0)
    counts, accepted = torch.zeros(8, 8), 0
    torch.manual_seed(0)
    options = {"max_new_tokens": 3, "stop_token_ids": [], "verify_rule": rule, "width": width, "paces": Paces()}
    for _ in range(samples):
        out = generate(target, drafter, start, **options, **{"temperature": temperature, **filters})
        counts[out.token_ids[1], out.token_ids[2]] += 1
        accepted += sum(out.accepted_lengths)
    assert accepted > samples / 20  # else nothing is tested
    assert not counts[third == 0].any()
    assert chi_square(counts, third) > 0.01


@pytest.mark.parametrize("filters", [{"temperature": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9}])
def test_filters_are_those_of_transformers(filters):
    """The distribution of the first token is the one that `model.generate` draws from."""
    target = make_target("qwen3")
    ids = torch.tensor([prompt()])
    settings = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, **filters}
    out = target.model.generate(
        ids,
        do_sample=True,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
        **settings,
    )
    sampler = Sampler(**{"temperature": 1.0, **filters})
    scores = sampler.scores(target.model(ids).logits[0, -1:].detach(), prompt())
    torch.testing.assert_close(sampler.probs(scores), out.scores[0].softmax(-1))


@pytest.mark.parametrize("confidence", wide([0.2, 0.6, 0.99], 0.2, 0.99))
@pytest.mark.parametrize("wrong", wide([0, 2, 3, 1], 0, 1, 3))
def test_any_pace_keeps_the_text(confidence, wrong, oracle, monkeypatch):
    """Whatever the drafter is and says, and whatever the costs, the text is the target's and the caches stay right."""
    costs = StepCosts([1.0, 1.2, 1.4, 1.6, 1.8, 2.0], 0.3)
    monkeypatch.setattr("dpace.decode.pace.measure_costs", lambda *_, **__: costs)
    monkeypatch.setattr("dpace.decode.copies.PromptLookup.propose", lambda *_: Copy())
    is_wrong = {0: lambda n: False, 1: lambda n: True}.get(wrong, lambda n: n % wrong == 0)
    target, drafter, plain = oracle(is_wrong, confidence, block_size=6)
    ours = generate(target, drafter, prompt(), max_new_tokens=50, stop_token_ids=[], width="auto")
    assert ours.token_ids == plain[:50]
    assert all(a < w for a, w in zip(ours.accepted_lengths, ours.widths, strict=True))
    if wrong == 1:  # nothing is ever accepted: soon hardly anything is drafted
        assert sum(width > 1 for width in ours.widths) < 10
    if wrong == 0 and confidence == 0.99:
        assert sum(ours.accepted_lengths) > 35


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["equality", "speculative"])
@pytest.mark.parametrize("is_copied", [lambda k: True, lambda k: k % 3 > 0], ids=["always", "in between"])
def test_copies_of_the_text_keep_it(is_copied, rule, temperature, monkeypatch):
    """The text stays the same and the drafter's later features are right, with copies only and with drafts between."""
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=6)
    monkeypatch.setattr(
        "dpace.decode.pace.measure_costs", lambda *_, **__: StepCosts([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], 0.1)
    )
    steps = itertools.count()

    def plan(_, copies, num_unread, can_draft):
        (copy,) = copies
        return Plan(not copy.token_ids or not is_copied(next(steps)), copy, len(copy.token_ids) + 1)

    monkeypatch.setattr("dpace.decode.pace.Pace.plan", plan)
    seen = []
    forward = drafter.forward
    monkeypatch.setattr(drafter, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    options = {"max_new_tokens": 60, "stop_token_ids": [], "temperature": temperature, "seed": 3}
    ours = generate(target, drafter, prompt() * 4, width="auto", verify_rule=rule, **options)
    if rule == "equality" or temperature == 0:
        assert ours.token_ids == generate_plain(target, prompt() * 4, **options).token_ids
    assert 0 < ours.num_copied <= sum(ours.accepted_lengths)
    text = prompt() * 4 + ours.token_ids
    assert len(seen) > 2
    for inputs in seen:  # positions follow each other without gaps, and features are those of the text
        end = int(inputs["position_ids"][0, -6])
        features = inputs["context_hidden_states"]
        expected = target.features(torch.tensor([text[:end]]), drafter.target_layer_ids)[:, -features.shape[1] :]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert sum(inputs["context_hidden_states"].shape[1] for inputs in seen) == end


@pytest.mark.parametrize(
    "filters",
    wide(
        [{}, {"temperature": 2.0, "top_k": 9, "min_p": 0.01}, {"temperature": 1.6, "top_p": 0.97}],
        {"temperature": 1.6, "top_p": 0.97},
    ),
)
def test_a_seed_gives_the_text_of_plain_decoding(filters, language_target, language_drafter, questions):
    """Also above temperature 0, with any width: the position's random numbers are the same."""
    options = {"temperature": 1.5, **filters, "max_new_tokens": 24, "stop_token_ids": []}
    accepted, texts = 0, set()
    for seed, ids in enumerate(questions[:4]):
        plain = generate_plain(language_target, ids, seed=seed, **options).token_ids
        for width in ("full", 3, "auto"):
            ours = generate(language_target, language_drafter, ids, seed=seed, width=width, **options)
            assert ours.token_ids == plain
            accepted += sum(ours.accepted_lengths)
            assert width != 3 or max(ours.widths) == 3 > max(ours.accepted_lengths)
        texts |= {tuple(generate_plain(language_target, ids, seed=s, **options).token_ids) for s in (seed, seed + 9)}
    assert accepted > 20 and len(texts) > 4  # else nothing is tested


@pytest.mark.parametrize(
    ("token_ids", "options", "match"),
    [
        ([], {}, "empty"),
        (torch.tensor([[5, 6], [7, 8]]), {}, "expected one row"),
        ([5] * 250, {"max_new_tokens": 10}, "limit of 256"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens"),
        ([5], {"max_new_tokens": 5, "temperature": -1.0}, "temperature"),
        *(([5], {"width": width}, "2 to 4 tokens to verify") for width in (1, 5, "half", None)),
        ([5], {"verify_rule": "Equality"}, "equality, speculative"),
    ],
)
def test_bad_requests(token_ids, options, match):
    target = make_target("qwen3")
    with pytest.raises(ValueError, match=match):
        generate(target, make_drafter(target), token_ids, **{"max_new_tokens": 5, **options})
