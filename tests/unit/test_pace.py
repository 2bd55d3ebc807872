import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpace.pace import MAX_PAUSE, Pace, StepCosts, measure_costs
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


def run(pace: Pace, steps: int, accepted_of, confidence=0.9) -> tuple[float, int]:
    """Tokens over the time that plain decoding would take for them, and drafts."""
    seconds, tokens, drafts = 0.0, 0, 0
    for _ in range(steps):
        if pace.wants_draft():
            width = pace.width([confidence] * (1 if pace.is_trial else 7))
            accepted = accepted_of(width)
            pace.record(width, accepted)
            seconds += pace.costs.draft_seconds + pace.costs.verify_seconds[width - 1]
            tokens, drafts = tokens + accepted + 1, drafts + 1
        else:
            seconds, tokens = seconds + pace.costs.verify_seconds[0], tokens + 1
    return tokens * pace.costs.verify_seconds[0] / seconds, drafts


COSTS = StepCosts([40.0, 50.0, 55.0, 60.0, 62.0, 64.0, 66.0, 70.0], 10.0)


def test_a_useless_drafter_costs_almost_nothing():
    speed, drafts = run(Pace(COSTS), 200, lambda width: 0)
    assert speed > 0.97 and drafts < 12


def test_a_drafter_that_knows_it_is_useless_costs_almost_nothing():
    """It is asked seldom, though nothing is ever verified that could fail."""
    speed, drafts = run(Pace(COSTS), 200, lambda width: 0, confidence=0.01)
    assert speed > 0.97 and drafts < 12


def test_a_good_drafter_is_used_at_every_step():
    speed, drafts = run(Pace(COSTS), 100, lambda width: width - 1)
    assert speed > 3 and drafts == 100


def test_a_drafter_that_gets_good_is_found_again():
    pace = Pace(COSTS)
    run(pace, 150, lambda width: 0)
    speed, _ = run(pace, 400, lambda width: width - 1)
    assert speed > 2.5 and pace.pause <= MAX_PAUSE


def test_a_drafter_that_was_useless_costs_less_in_the_next_response():
    first = Pace(COSTS)
    speed, _ = run(first, 36, lambda width: 0)
    again, drafts = run(Pace(COSTS, first), 36, lambda width: 0)
    assert again > speed and again > 0.97 and drafts == 2
    good, drafts = run(Pace(COSTS, first), 36, lambda width: width - 1)
    assert good > 2.5 and drafts == 36


def test_costs_are_measured_once():
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=6)
    costs = measure_costs(target, drafter)
    assert len(costs.verify_seconds) == 6 and min(costs.verify_seconds) > 0 < costs.draft_seconds
    assert measure_costs(target, drafter) is costs
    assert measure_costs(target, drafter, 2) is not costs
    better = measure_costs(target, drafter, num_rounds=6)
    assert better is not costs and measure_costs(target, drafter) is better
