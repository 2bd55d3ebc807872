"""The rule of width `auto`, against steps whose costs and outcomes are known."""

import itertools
import operator
import random
from functools import partial

import pytest
from hypothesis import given, strategies as st

from dpace.decode import generate
from dpace.decode.copies import Copy
from dpace.decode.pace import COPY_WIDTH, Pace, Paces, Plan, StepCosts, best_width, measure_costs
from tests.support.models import make_drafter, make_target

COSTS = StepCosts([40.0, 50.0, 55.0, 60.0, 62.0, 64.0, 66.0, 70.0], 10.0)
COPIES = [Copy(match, [1] * 7) for match in range(4)]
"""By the length of the match before them."""


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.lists(st.floats(0.01, 1), min_size=8, max_size=8))
def test_best_width_is_the_best_of_all(confidences, increments):
    seconds = list(itertools.accumulate(increments))
    reach = list(itertools.accumulate(confidences, operator.mul))
    width, emitted = best_width(reach, seconds)
    counts = [1 + sum(reach[:k]) for k in range(len(reach) + 1)]
    rates = [*map(operator.truediv, counts, seconds)]
    assert emitted == pytest.approx(counts[width - 1]) and rates[width - 1] == pytest.approx(max(rates))


def seconds_of(costs, width, is_drafted):
    return costs.verify_seconds[width - 1] + is_drafted * costs.draft_seconds


def run(pace, steps, draw, num_unread=0):
    """Decode; return tokens in the seconds of a plain step, and the number of drafts.

    `draw` gives the confidences of a step, and how many drafted tokens are right.
    """
    seconds, tokens, drafts = 0.0, 0, 0
    for _ in range(steps):
        confidences, right = draw()
        plan = pace.plan(num_unread=num_unread)
        if plan.is_drafted:
            plan = pace.choose_width(plan, confidences)
        accepted = min(right, plan.width - 1)
        cost = seconds_of(pace.costs, plan.width, plan.is_drafted)
        cost += plan.is_drafted * num_unread * pace.costs.read_seconds
        pace.learn(plan, [2], accepted, seconds=cost, lookups=[(0, False)] * (accepted + 1))
        seconds += cost
        tokens += accepted + 1
        drafts += plan.is_drafted
    return tokens * pace.costs.verify_seconds[0] / seconds, drafts


def always(right, confidence=0.9):
    return lambda: ([confidence] * 7, right)


@pytest.mark.parametrize(("confidence", "most"), [(0.01, 12), (0.9, 30)])
def test_a_useless_drafter_costs_almost_nothing(confidence, most):
    """One that knows it is useless, and one that promises much: that takes some drafts to find out, but once only."""
    pace = Pace(COSTS, 8)
    speed, drafts = run(pace, 200, always(0, confidence))
    assert speed > 0.95 and drafts <= most
    again, drafts = run(pace, 200, always(0, confidence))
    assert again > 0.98 and 0 < drafts <= 12
    assert run(pace, 600, always(7))[0] > 2.0, "one that gets good is found again"


def test_a_drafter_that_is_never_right_for_days_is_not_verified():
    """Means of zeros round to 0 in the end."""
    pace = Pace(COSTS, 8)
    pace.promised_and_accepted.value[:] = 1.0, 0.0
    assert pace.choose_width(Plan(True), [0.9] * 7).width == 1


def test_trials_that_read_a_prompt_are_rarer():
    """A useless drafter is tried again for a share of the time, in which what it reads counts too."""
    costs = COSTS._replace(read_seconds=0.2)
    counts = [run(Pace(costs, 8), 2000, always(0), num_unread)[1] for num_unread in (1, 100, 300)]
    assert counts[0] > counts[1] > counts[2] > 0


def sure(best):
    """Drafts of all kinds, from hopeless to sure, that are right as often as they say."""

    def draft(rng, _):
        confidences = [rng.uniform(0.05, best) * 0.85**k for k in range(7)]
        return confidences, confidences

    return draft


def changing(rng, number):
    """A drafter that gets better and worse, and does not know it, in stretches of 300 steps."""
    return [rng.uniform(0.5, 1) for _ in range(7)], [(0.05, 0.9)[number // 300 % 2]] * 7


@pytest.mark.parametrize("draft", [sure(0.75), sure(0.95), changing])
def test_the_pace_gains_more_than_any_fixed_width(draft):
    """With the same drafts: neither bad luck nor a weak stretch ends drafting."""
    pace = Pace(StepCosts([19.8, 20.5, 21.5, 22.5, 23.0, 23.5, 24.0, 25.0], 7.0), 8)

    def draws():
        rng = random.Random(0)
        for number in range(1800):
            confidences, chances = draft(rng, number)
            yield confidences, next((k for k, chance in enumerate(chances) if rng.random() > chance), 7)

    def fixed(width):
        tokens = sum(min(right, width - 1) + 1 for _, right in draws()) / 1800
        return tokens * pace.costs.verify_seconds[0] / seconds_of(pace.costs, width, width > 1)

    assert run(pace, 1800, partial(next, draws()))[0] > max(map(fixed, range(1, 9)))


@pytest.mark.parametrize("told", [lambda chance: chance**3, lambda chance: 0.4 * chance, lambda chance: chance**0.3])
def test_confidences_that_are_wrong_cost_little(told):
    """Of a good drafter, too modest ones and too sure ones, over those that are right."""
    speeds = []
    for say in (told, lambda chance: chance):
        rng = random.Random(0)

        def draw(say=say, rng=rng):
            chances = [rng.uniform(0.6, 0.98) * 0.98**k for k in range(7)]
            return [*map(say, chances)], next((k for k, chance in enumerate(chances) if rng.random() > chance), 7)

        speeds.append(run(Pace(COSTS, 8), 1000, draw)[0])
    assert speeds[0] > 0.93 * speeds[1] > 1.2


def test_costs_that_change_are_learned():
    """Over those of a plain step, which takes twice as long too; some steps are disturbed."""
    pace = Pace(COSTS, 8)
    for number in range(3000):
        plan = Plan(number % 3 == 0, width=1 + number % 8)
        factor = 3.0 if plan.is_drafted else 4.0 if plan.width > 2 else 2.0
        seconds = factor * seconds_of(COSTS, plan.width, plan.is_drafted) * (8 if number % 40 == 0 else 1)
        pace.learn(plan, [1], 0, seconds=seconds)
    plain, two, *wide = COSTS.verify_seconds
    assert pace.pass_seconds == pytest.approx([plain, two, *(2 * seconds for seconds in wide)], rel=0.1)
    assert pace.draft_factor == pytest.approx(1.5, rel=0.1)


def test_what_is_copied_is_verified_as_far_as_it_was_right():
    """And with a good drafter, sure copies only: as many tokens, and no time to draft them."""
    pace = Pace(COSTS, 8)
    run(pace, 50, always(0))  # a useless drafter
    for match, emitted in ((1, [2, 1, 1]), (2, [1, 1, 2]), (3, [1] * 8)):
        for _ in range(80):
            pace.learn(Plan(False, copies=[COPIES[match]]), emitted, 0, seconds=COSTS.verify_seconds[0])
    pace.credit = 0.0
    assert [pace.plan([copy]).width for copy in COPIES[1:]] == [1, 5, 8]
    assert pace.plan([Copy(3, [1, 1])])[:3] == (False, Copy(3, [1, 1]), 3) and not pace.plan().is_drafted
    assert pace.plan([Copy(), COPIES[1]])[1:3] == (COPIES[1], 1)  # its kind counts, though none is copied
    assert pace.plan(COPIES).copy == pace.plan(COPIES[::-1]).copy == COPIES[3]
    run(pace, 600, always(7, 0.99))
    assert [pace.plan([copy]).is_drafted for copy in COPIES[2:]] == [True, False]


def test_what_was_learned_is_the_callers(monkeypatch):
    """Paces that are passed on know a drafter and a temperature again; calls without them leave nothing behind."""
    target = make_target("qwen3")
    drafter, other = (make_drafter(target, block_size=6) for _ in range(2))
    measured = []
    monkeypatch.setattr("dpace.decode.pace.measure_costs", lambda *args: measured.append(args[2]) or COSTS)
    paces = Paces()
    found = {paces.get(target, drafter, temperature) for temperature in (0.0, 1.0, 0.5)}
    assert len(found) == 3 and measured == [False, True] and paces.get(target, drafter) in found
    assert paces.get(target, other) not in found and len(measured) == 3
    for _ in range(2):
        generate(target, drafter, [4, 5], max_new_tokens=3)
    assert len(measured) == 5


def test_costs_of_steps():
    target = make_target("qwen3")
    for drafter in (make_drafter(target, block_size=6), None):
        costs = measure_costs(target, drafter, is_sampled=True)
        assert len(costs.verify_seconds) == COPY_WIDTH and min(costs.verify_seconds) > 0
        assert (costs.draft_seconds > 0) == (drafter is not None)
        assert list(costs.verify_seconds) == sorted(costs.verify_seconds)  # a width is never slower than a wider one
