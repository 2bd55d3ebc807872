import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpace.decode.batch import batch_steps
from dpace.decode.costs import DRAFT, FIRST_DRAFT, StepCosts, StepTimer, measure_costs, single_steps
from dpace.decode.loop import generate
from dpace.decode.pace import Pace, Paces
from tests.conftest import make_drafter, make_target

rates = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@given(rates, st.lists(st.floats(0.01, 1), min_size=8, max_size=8), st.floats(0, 1))
def test_best_width_is_the_best_of_all(confidences, increments, draft):
    """Against trying every width."""
    costs = StepCosts([sum(increments[: i + 1]) for i in range(8)], draft)
    reach = [float(x) for x in itertools.accumulate(confidences, lambda a, b: a * b)]
    width, emitted = costs.best_width(reach)

    def rate(w):
        return (1 + sum(reach[: w - 1])) / (draft + costs.verify_seconds[w - 1])

    assert rate(width) == pytest.approx(max(rate(w) for w in range(1, len(reach) + 2)))
    assert emitted == pytest.approx(1 + sum(reach[: width - 1]))


def test_a_draft_that_costs_nothing_to_verify_is_verified_whole():
    assert StepCosts([1.0] * 8, 0.1).best_width([0.1] * 7)[0] == 8
    assert StepCosts([1.0 * w for w in range(1, 9)], 0.1).best_width([0.1] * 7)[0] == 1


def run(pace: Pace, steps: int, accepted_of, confidence=0.9, slowness=1.0) -> tuple[float, int]:
    """Give the speed over plain decoding and the number of drafts; drafted steps take `slowness` times their costs."""
    seconds, tokens, drafts = 0.0, 0, 0
    for _ in range(steps):
        if pace.plan(0, 0)[1]:
            width = pace.width([confidence] * 7)
            accepted = accepted_of(width)
            cost = slowness * (pace.costs.draft_seconds + pace.costs.verify_seconds[width - 1])
            pace.record(width, accepted, cost)
            seconds, tokens, drafts = seconds + cost, tokens + accepted + 1, drafts + 1
        else:
            pace.record_plain(pace.costs.verify_seconds[0])
            seconds, tokens = seconds + pace.costs.verify_seconds[0], tokens + 1
    return tokens * pace.costs.verify_seconds[0] / seconds, drafts


COSTS = StepCosts([40.0, 50.0, 55.0, 60.0, 62.0, 64.0, 66.0, 70.0], 10.0)


@pytest.mark.parametrize(("confidence", "most"), [(0.01, 12), (0.9, 30)])
def test_a_useless_drafter_costs_almost_nothing(confidence, most):
    """One that knows it is useless, and one that promises much: that takes some drafts to find out, but once only."""
    pace = Pace(COSTS)
    speed, drafts = run(pace, 200, lambda width: 0, confidence)
    assert speed > 0.95 and drafts <= most
    again, drafts = run(pace, 200, lambda width: 0, confidence)
    assert again > 0.985 and drafts <= 12


def test_a_good_drafter_is_used_at_every_step():
    speed, drafts = run(Pace(COSTS), 100, lambda width: width - 1)
    assert speed > 3 and drafts == 100


@pytest.mark.parametrize("best", [0.75, 0.95])
def test_a_drafter_that_is_right_as_often_as_it_says_gains_more_than_any_fixed_width(best):
    """Drafts of all kinds, from hopeless to sure: neither bad luck nor a weak stretch ends drafting."""
    rng, pace = random.Random(0), Pace(StepCosts([19.8, 20.5, 21.5, 22.5, 23.0, 23.5, 24.0, 25.0], 7.0))

    def draft() -> tuple[list[float], int]:
        confidences = [rng.uniform(0.05, best) * 0.85**k for k in range(7)]
        return confidences, next((k for k, c in enumerate(confidences) if rng.random() > c), 7)

    def speed(width_of, steps=2000) -> float:
        seconds = tokens = 0.0
        for _ in range(steps):
            width, (confidences, right) = 1, draft()
            drafts = width_of is not None or pace.plan(0, 0)[1]
            if drafts:
                width = width_of or pace.width(confidences)
            accepted = min(right, width - 1)
            cost = pace.costs.verify_seconds[width - 1] + drafts * pace.costs.draft_seconds
            if drafts and width_of is None:
                pace.record(width, accepted, cost)
            seconds += cost
            tokens += accepted + 1
        return tokens * pace.costs.verify_seconds[0] / seconds

    assert speed(None) > max(1.0, *(speed(width) for width in range(2, 9)))


def test_costs_that_were_measured_wrong_are_corrected():
    """Drafts that would pay by the costs, and do not by what steps take; the same where all steps take longer."""
    costs = StepCosts([20.0, 20.5, 21.0, 21.5, 22.0, 22.5, 23.0, 24.0], 5.0)

    def accepted(rng):
        return lambda width: min(width - 1, rng.choice([0, 0, 0, 1]))

    speed, drafts = run(Pace(costs), 1000, accepted(random.Random(0)), confidence=0.25, slowness=1.5)
    assert speed > 0.97
    trusting = Pace(costs)
    trusting._learn_slowness = lambda kind, ratio: None
    slower, more_drafts = run(trusting, 1000, accepted(random.Random(0)), confidence=0.25, slowness=1.5)
    assert slower < 0.95 and more_drafts > drafts
    slow = Pace(costs)
    for _ in range(100):
        slow.record_plain(2 * costs.verify_seconds[0])
    assert run(slow, 200, lambda width: width - 1, slowness=2.0)[1] > 190


def test_a_drafter_that_gets_good_is_found_again():
    pace = Pace(COSTS)
    run(pace, 150, lambda width: 0)
    speed, _ = run(pace, 400, lambda width: width - 1)
    assert speed > 2.5


def test_what_is_copied_is_verified_as_far_as_it_was_right():
    pace = Pace(COSTS)
    run(pace, 50, lambda width: 0)  # a useless drafter
    proposal = [1] * 7
    for _ in range(40):
        pace.learn_copying(1, proposal, [2, 1, 1])
        pace.learn_copying(2, proposal, [1, 1, 2])
        pace.learn_copying(3, proposal, [1] * 8)
    assert pace.copied[1][0][0] / pace.copied[1][0][1] < 0.03
    assert pace.copied[2][1][0] / pace.copied[2][1][1] == pytest.approx(0.5, abs=0.05)
    pace.credit = 0.0
    assert [pace.plan(match, 7)[0] for match in (1, 2, 3)] == [1, 5, 8]
    assert pace.plan(3, 2) == (3, False) and pace.plan(0, 0) == (1, False)


def test_a_good_drafter_is_preferred_to_doubtful_copies():
    """And is tried where it was not yet, with what it gave elsewhere."""
    pace = Pace(COSTS)
    run(pace, 50, lambda width: width - 1, confidence=0.99)
    for _ in range(40):
        pace.learn_copying(2, [1] * 7, [1, 1, 2])
        pace.learn_copying(3, [1] * 7, [1] * 8)
    assert pace.plan(2, 7) == (1, True)
    assert pace.plan(3, 7) == (8, False)  # as many tokens, and no time to draft them


def test_drafts_are_told_apart_by_the_match_before_them():
    """A drafter that is right only where nothing is found in the text is used there, and hardly elsewhere."""
    pace = Pace(COSTS)
    for _ in range(150):
        for match, accepted in ((0, 7), (1, 0)):
            if pace.plan(match, 0)[1]:
                pace.width([0.9] * 7)
                pace.record(8, accepted, None)
    assert pace.plan(0, 0)[1]
    assert sum(pace.plan(1, 0)[1] for _ in range(100)) < 4


def test_drafting_what_would_have_been_copied_is_worth_little():
    """A drafter that is right only where copying is right loses to copying; one that is right elsewhere does not."""
    for is_copyable, most in ((True, 4), (False, 100)):
        pace = Pace(COSTS)
        for _ in range(40):
            pace.learn_copying(3, [1] * 7, [1] * 8)
        for _ in range(60):
            if pace.plan(0, 0)[1]:
                pace.width([0.9] * 7)
                pace.record(8, 2, None, [(0, False), (3, is_copyable), (3, is_copyable)])
        assert sum(pace.plan(0, 0)[1] for _ in range(100)) in (range(1, most) if is_copyable else [100])


def test_a_drafter_that_loses_is_not_tried_where_it_has_much_to_read():
    pace = Pace(StepCosts(COSTS.verify_seconds, COSTS.draft_seconds, reading_seconds=200.0))
    run(pace, 200, lambda width: 0)
    tries = {num_unread: sum(pace.plan(0, 0, num_unread)[1] for _ in range(2000)) for num_unread in (0, 128)}
    assert 0 < 5 * tries[128] < tries[0]


def test_what_was_learned_is_the_callers(monkeypatch):
    """Paces that are passed on know a drafter and a temperature again; calls without them leave nothing behind."""
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=6)
    measured = []
    monkeypatch.setattr(
        "dpace.decode.pace.measure_costs", lambda *_, temperature: measured.append(temperature) or COSTS
    )
    paces = Paces()
    pace = paces.get(target, drafter)
    assert paces.get(target, drafter) is pace and paces.get(target, drafter, 1.0) is not pace
    assert paces.get(target, drafter, 0.5) is not paces.get(target, drafter, 1.0) and measured == [0.0, 1.0]
    assert paces.get(target, make_drafter(target, block_size=6)) is not pace and len(measured) == 3
    for _ in range(2):
        generate(target, drafter, [4, 5], max_new_tokens=3)
    assert len(measured) == 5


def test_steps_of_a_batch_are_those_of_generate_batch():
    """They leave the rows as they were, and draft and verify what they are told."""
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=6)
    read, calls = target.hidden, []
    target.hidden = lambda ids, **kwargs: calls.append(tuple(ids.shape)) or read(ids, **kwargs)
    step = batch_steps(target, drafter, 3, context=40)
    for width in (1, 6, DRAFT, FIRST_DRAFT, 2):
        step(width)
    assert calls == [(3, 40), (3, 1), (3, 6), (3, 2)]
    timer = StepTimer([single_steps(target, drafter), step], 6)
    timer.run()
    timer.run()
    assert [len(seconds) for seconds in timer.seconds[1].values()] == [1] * len(
        timer.seconds[1]
    )  # the first is not counted
    single, three = timer.costs(min)
    assert len(three.verify_seconds) == 6 and three.draft_seconds > 0 <= single.reading_seconds


def test_costs_of_steps():
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=6)
    costs = measure_costs(target, drafter)
    assert len(costs.verify_seconds) == 6 and min(costs.verify_seconds) > 0 < costs.draft_seconds
    assert list(costs.verify_seconds) == sorted(costs.verify_seconds)  # a width is never slower than a wider one
