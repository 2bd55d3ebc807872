import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpace.decode.copies import Copy
from dpace.decode.costs import StepCosts, measure_costs
from dpace.decode.loop import generate, generate_plain
from dpace.decode.pace import Pace, Paces, Plan, best_width
from tests.conftest import make_drafter, make_target

rates = st.lists(st.floats(0, 1), min_size=1, max_size=7)


@given(rates, st.lists(st.floats(0.01, 1), min_size=8, max_size=8))
def test_best_width_is_the_best_of_all(confidences, increments):
    """Against trying every width."""
    seconds = list(itertools.accumulate(increments))
    reach = list(itertools.accumulate(confidences, lambda a, b: a * b))
    width, emitted = best_width(reach, seconds)

    def rate(w):
        return (1 + sum(reach[: w - 1])) / seconds[w - 1]

    assert rate(width) == pytest.approx(max(rate(w) for w in range(1, len(reach) + 2)))
    assert emitted == pytest.approx(1 + sum(reach[: width - 1]))


COSTS = StepCosts([40.0, 50.0, 55.0, 60.0, 62.0, 64.0, 66.0, 70.0], 10.0)
SURE = [0.9] * 7


def seconds_of(costs: StepCosts, width: int, is_drafted: bool) -> float:
    return costs.verify_seconds[width - 1] + is_drafted * costs.draft_seconds


def run(pace: Pace, steps: int, draw, *, costs=None, copies=lambda: [], can_draft=True) -> tuple[float, int]:
    """Decode; return tokens in the seconds of a plain step, and the number of drafts.

    `draw` gives the confidences of a step, and how many drafted and how many copied tokens are right.
    """
    costs = costs or pace.costs
    seconds, tokens, drafts = 0.0, 0, 0
    for _ in range(steps):
        confidences, right, copied = (*draw(), 0)[:3]
        plan = pace.plan(copies(), can_draft=can_draft)
        if plan.is_drafted:
            plan = pace.choose_width(plan, confidences)
        accepted = min(right if plan.is_drafted else copied, plan.width - 1)
        cost = seconds_of(costs, plan.width, plan.is_drafted)
        pace.learn(plan, [1] * copied + [2], accepted, seconds=cost, lookups=[(0, False)] * (accepted + 1))
        seconds += cost
        tokens += accepted + 1
        drafts += plan.is_drafted
    return tokens * costs.verify_seconds[0] / seconds, drafts


def always(right: int, confidence: float = 0.9, copied: int = 0):
    return lambda: ([confidence] * 7, right, copied)


def learn_copies(pace: Pace, match: int, emitted: list[int]) -> None:
    """Copy seven times the token 1."""
    for _ in range(80):
        pace.learn(Plan(False, copies=[Copy(match, [1] * 7)]), emitted, 0, seconds=COSTS.verify_seconds[0])


def count_drafts(pace: Pace, steps: int, *args) -> int:
    return sum(pace.plan(*args).is_drafted for _ in range(steps))


@pytest.mark.parametrize(("confidence", "most"), [(0.01, 12), (0.9, 30)])
def test_a_useless_drafter_costs_almost_nothing(confidence, most):
    """One that knows it is useless, and one that promises much: that takes some drafts to find out, but once only."""
    pace = Pace(COSTS)
    speed, drafts = run(pace, 200, always(0, confidence))
    assert speed > 0.95 and drafts <= most
    again, drafts = run(pace, 200, always(0, confidence))
    assert again > 0.98 and drafts <= 12


@pytest.mark.parametrize("draft_seconds", [0.2, 10.0])
def test_where_copies_are_right_a_useless_drafter_costs_little_of_the_time(draft_seconds):
    """Trials are paid in seconds: a token is worth few of these where many are copied at once."""
    costs = StepCosts(COSTS.verify_seconds, draft_seconds)
    numbers = itertools.count()

    def copies() -> list[Copy]:  # some steps find none, where a trial seems to cost little
        return [Copy(3, [1] * 7)] if next(numbers) % 4 else []

    speeds = []
    for can_draft in (True, False):
        pace = Pace(costs)
        run(pace, 100, always(0, copied=7), copies=copies, can_draft=can_draft)
        speeds.append(run(pace, 1000, always(0, copied=7), copies=copies, can_draft=can_draft)[0])
    assert 0.98 * speeds[1] < speeds[0] < speeds[1]


@pytest.mark.parametrize("best", [0.75, 0.95])
def test_a_drafter_that_is_right_as_often_as_it_says_gains_more_than_any_fixed_width(best):
    """Drafts of all kinds, from hopeless to sure: neither bad luck nor a weak stretch ends drafting."""
    rng, pace = random.Random(0), Pace(StepCosts([19.8, 20.5, 21.5, 22.5, 23.0, 23.5, 24.0, 25.0], 7.0))

    def draw() -> tuple[list[float], int]:
        confidences = [rng.uniform(0.05, best) * 0.85**k for k in range(7)]
        return confidences, next((k for k, c in enumerate(confidences) if rng.random() > c), 7)

    def fixed(width: int) -> float:
        tokens = sum(min(draw()[1], width - 1) + 1 for _ in range(2000)) / 2000
        return tokens * pace.costs.verify_seconds[0] / seconds_of(pace.costs, width, True)

    assert run(pace, 2000, draw)[0] > max(1.0, *(fixed(width) for width in range(2, 9)))


CHANGES = {
    "all steps are slower": (2.0, 2.0, 2.0),
    "all steps are faster": (0.5, 0.5, 0.5),
    "wide passes are slower": (1.0, 2.0, 1.5),
    "drafts are slower": (1.0, 1.0, 2.0),
    "drafts are faster": (1.0, 1.0, 0.5),
    "all is four times slower, and drafts ten": (4.0, 4.0, 10.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_costs_that_change_in_the_middle_are_learned(change):
    """Of all kinds of steps, over those of a plain one; some steps are disturbed."""
    plain, wide, drafted = CHANGES[change]
    pace = Pace(COSTS)
    for number in range(3000):
        width = 1 + number % 8
        plan = Plan(number % 3 == 0, width=width)
        factor = drafted if plan.is_drafted else wide if width > 2 else plain
        seconds = factor * seconds_of(COSTS, width, plan.is_drafted) * (8 if number % 40 == 0 else 1)
        pace.learn(plan, [1], 0, seconds=seconds)
    expected = [seconds * (wide if w > 2 else plain) / plain for w, seconds in enumerate(COSTS.verify_seconds, start=1)]
    assert pace.pass_seconds == pytest.approx(expected, rel=0.1)
    assert pace.draft_factor == pytest.approx(drafted / plain, rel=0.1)


def test_a_drafter_that_gets_good_is_found_again():
    pace = Pace(COSTS)
    run(pace, 150, always(0))
    speed, _ = run(pace, 600, always(7))
    assert speed > 2.0


def test_what_is_copied_is_verified_as_far_as_it_was_right():
    pace = Pace(COSTS)
    run(pace, 50, always(0))  # a useless drafter
    for match, emitted in ((1, [2, 1, 1]), (2, [1, 1, 2]), (3, [1] * 8)):
        learn_copies(pace, match, emitted)
    pace.credit = 0.0
    assert [pace.plan([Copy(match, [1] * 7)]).width for match in (1, 2, 3)] == [1, 5, 8]
    assert pace.plan([Copy(3, [1, 1])])[:3] == (False, Copy(3, [1, 1]), 3) and not pace.plan().is_drafted
    assert pace.plan([Copy(), Copy(1, [1] * 7)])[1:3] == (Copy(1, [1] * 7), 1)  # its kind counts, though none is copied
    both = [Copy(2, [1] * 7), Copy(3, [1] * 7)]
    assert pace.plan(both).copy is both[1] and pace.plan(both[::-1]).copy is both[1]


def test_a_good_drafter_is_preferred_to_doubtful_copies():
    """And is tried where it was not yet, with what it gave elsewhere."""
    pace = Pace(COSTS)
    run(pace, 50, always(7, 0.99))
    learn_copies(pace, 2, [1, 1, 2])
    learn_copies(pace, 3, [1] * 8)
    assert pace.plan([Copy(2, [1] * 7)]).is_drafted
    assert not pace.plan([Copy(3, [1] * 7)]).is_drafted  # as many tokens, and no time to draft them


def test_drafts_are_told_apart_by_the_match_before_them():
    """A drafter that is right only where nothing is found in the text is used there, and hardly elsewhere."""
    pace = Pace(COSTS)
    for match, right in ((0, 7), (1, 0)) * 150:
        run(pace, 1, always(right), copies=lambda match=match: [Copy(match)])
    assert pace.plan().is_drafted and count_drafts(pace, 100, [Copy(1)]) < 6


def test_drafting_what_would_have_been_copied_is_worth_little():
    """A drafter that is right only where copying is right loses to copying; one that is right elsewhere does not."""
    for is_copyable, counts in ((True, range(1, 7)), (False, [100])):
        pace = Pace(COSTS)
        learn_copies(pace, 3, [1] * 8)
        for _ in range(60):
            plan = pace.plan()
            if plan.is_drafted:
                lookups = [(0, False), (3, is_copyable), (3, is_copyable)]
                plan = pace.choose_width(plan, SURE)
                pace.learn(plan, [2], 2, seconds=seconds_of(COSTS, plan.width, True), lookups=lookups)
        assert count_drafts(pace, 100) in counts


def test_a_drafter_that_loses_is_not_tried_where_it_has_much_to_read():
    pace = Pace(StepCosts(COSTS.verify_seconds, COSTS.draft_seconds, reading_seconds=200.0))
    run(pace, 200, always(0))
    tries = {num_unread: count_drafts(pace, 2000, [], num_unread) for num_unread in (0, 128)}
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


def test_costs_of_steps():
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=6)
    costs = measure_costs(target, drafter)
    assert len(costs.verify_seconds) == 6 and min(costs.verify_seconds) > 0 < costs.draft_seconds
    assert list(costs.verify_seconds) == sorted(costs.verify_seconds)  # a width is never slower than a wider one


def test_copies_alone_never_draft(monkeypatch):
    """The text is the target's, and repeated text is copied."""
    target = make_target("qwen3")
    drafter = make_drafter(target)
    prompt = [5, 6, 7, 8, 9] * 4
    plain = generate_plain(target, prompt, max_new_tokens=40, stop_token_ids=[])
    monkeypatch.setattr("dpace.decode.loop.draft_step", lambda *_: pytest.fail("a block was drafted"))
    ours = generate(target, drafter, prompt, max_new_tokens=40, stop_token_ids=[], width="copies")
    assert ours.token_ids == plain.token_ids
    assert ours.num_copied == sum(ours.accepted_lengths) > 0
