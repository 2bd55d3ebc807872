"""The text of one prompt: at temperature 0, of a seed, with any drafter, pace and end."""

import itertools

import pytest
import torch

from dpace.decode import generate, generate_plain
from dpace.decode.pace import Plan, StepCosts
from tests.support.cases import wide
from tests.support.models import Oracle, make_drafter, make_target

PROMPT = [48, 51, 10, 35, 21, 44, 17]


@pytest.mark.parametrize("block_size", wide([2, 3, 5, 8], 5))
def test_greedy_text_is_the_targets(random_target, block_size):
    drafter = make_drafter(random_target, block_size=block_size)
    own = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = random_target.model.generate(torch.tensor([PROMPT]), **own)[0, 7:].tolist()
    options = {"max_new_tokens": 20, "stop_token_ids": []}
    assert generate_plain(random_target, PROMPT, **options).token_ids == expected
    for width in ("full", 2, "auto"):
        ours = generate(random_target, drafter, PROMPT, width=width, **options)
        assert ours.token_ids == expected
        assert width == "auto" or ours.widths[0] == (2 if width == 2 else block_size)


@pytest.fixture
def oracle(monkeypatch):
    """Make a target, a drafter that drafts its text with faults, and 60 tokens of that text."""

    def make(is_wrong):
        target = make_target("qwen3")
        drafter = make_drafter(target)
        plain = generate_plain(target, PROMPT, max_new_tokens=60, stop_token_ids=[]).token_ids
        Oracle(monkeypatch, drafter, target, PROMPT + plain, is_wrong)
        return target, drafter, plain

    return make


def never(number):
    return False


@pytest.mark.parametrize(
    ("is_wrong", "expected"), [(never, [3] * 5), (lambda n: True, [0] * 20), (lambda n: n % 3 == 2, [2] * 7)]
)
def test_right_drafts_are_accepted_up_to_the_first_fault(is_wrong, expected, oracle):
    target, drafter, plain = oracle(is_wrong)
    ours = generate(target, drafter, PROMPT, max_new_tokens=21, stop_token_ids=[], width="full")
    assert ours.token_ids == plain[:21]
    assert ours.accepted_lengths == expected and sum(ours.emitted_lengths) == 20


def test_a_text_ends_anywhere_in_a_block(oracle):
    """By its length or by a stop token, which may be the prompt's last token too."""
    target, drafter, plain = oracle(never)
    for end in (1, 2, 4, 5, 8):
        last = plain.index(plain[end]) + 1
        stops = [plain[end], PROMPT[-1]]
        for count, options in ((end, {"max_new_tokens": end}), (last, {"max_new_tokens": 20, "stop_token_ids": stops})):
            ours = generate(target, drafter, PROMPT, width="full", **options)
            assert ours.token_ids == plain[:count] == generate_plain(target, PROMPT, **options).token_ids
            assert sum(ours.emitted_lengths) == count - 1 == ours.acceptance.emitted_tokens.sum()


@pytest.mark.parametrize(("turns", "rule"), [([False], "speculative"), ([False, False, True], "equality")])
def test_copies_of_the_text_keep_it(turns, rule, monkeypatch):
    """The drafter's later features are right, with copies only and with a draft in each third step."""
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=6)
    turn = itertools.cycle(turns)
    unread = []

    def plan(_, copies, num_unread, **_options):
        (copy,) = copies
        is_drafted = not copy.token_ids or next(turn)
        unread.extend([num_unread] * is_drafted)
        return Plan(is_drafted, copy, 1 if is_drafted else 1 + len(copy.token_ids))

    costs = StepCosts([1.0 + 0.2 * k for k in range(16)], 0.3)
    monkeypatch.setattr("dpace.decode.pace.measure_costs", lambda *_: costs)
    monkeypatch.setattr("dpace.decode.pace.Pace.plan", plan)
    seen = []
    forward = drafter.forward
    monkeypatch.setattr(drafter, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    options = {"max_new_tokens": 60, "stop_token_ids": [], "temperature": 0.5, "seed": 3}
    ours = generate(target, drafter, PROMPT * 4, verify_rule=rule, **options)
    if rule == "equality":
        assert ours.token_ids == generate_plain(target, PROMPT * 4, **options).token_ids
    assert 0 < ours.num_copied <= sum(ours.accepted_lengths)
    text = torch.tensor([PROMPT * 4 + ours.token_ids])
    assert len(seen) > 2
    for inputs in seen:  # positions follow each other without gaps, and features are those of the text
        end = int(inputs["position_ids"][0, -6])
        features = inputs["context_hidden_states"]
        expected = target.features(text[:, :end], drafter.target_layer_ids)[:, -features.shape[1] :]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert [inputs["context_hidden_states"].shape[1] for inputs in seen] == unread and sum(unread) == end


@pytest.mark.parametrize("is_drafter", [True, False])
def test_copies_alone_never_draft(is_drafter, monkeypatch):
    """Beside a drafter whose blocks are shorter than a copy, and without one."""
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=2) if is_drafter else None
    options = {"max_new_tokens": 40, "stop_token_ids": []}
    plain = generate_plain(target, PROMPT[:5] * 4, **options)
    costs = StepCosts([1.0 + 0.1 * k for k in range(16)], 0.3)  # of a quiet machine, where copies pay
    monkeypatch.setattr("dpace.decode.pace.measure_costs", lambda *_: costs)
    monkeypatch.setattr("dpace.decode.loop.draft_step", lambda *_: pytest.fail("a block was drafted"))
    ours = generate(target, drafter, PROMPT[:5] * 4, width="copies" if is_drafter else "auto", **options)
    assert ours.token_ids == plain.token_ids and ours.num_copied == sum(ours.accepted_lengths) > 0
    assert max(ours.widths) > 2 and len(ours.acceptance.histogram) == ours.block_size == 16


@pytest.mark.parametrize(
    ("token_ids", "options", "match"),
    [
        ([], {}, "empty"),
        (torch.tensor([[5, 6], [7, 8]]), {}, "not one row"),
        ([5] * 250, {"max_new_tokens": 7}, "limit of 256"),
        ([5], {"width": 1}, "2 to 4 tokens to verify"),
        ([5], {"width": 5}, "width is 5"),
        ([5], {"verify_rule": "Equality"}, "equality, speculative"),
        ([5], {"width": 2, "drafter": None}, "width is 2"),
    ],
)
def test_bad_requests(token_ids, options, match):
    target = make_target("qwen3")
    with pytest.raises(ValueError, match=match):
        generate(target, token_ids=token_ids, **{"drafter": make_drafter(target), "max_new_tokens": 5, **options})
