import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpace.decode.copies import Copy
from dpace.decode.costs import StepCosts, measure_costs
from dpace.decode.loop import generate, generate_plain
from dpace.decode.pace import Pace, Paces, Plan
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


COSTS = StepCosts([40.0, 50.0, 55.0, 60.0, 62.0, 64.0, 66.0, 70.0], 10.0)
SURE = [0.9] * 7


def costs_of(costs: StepCosts, wide: float = 1.0, draft: float = 1.0, speed: float = 1.0):
    """Return the seconds of steps on a machine: those of costs, with factors for wide passes, drafts and all."""

    def seconds_of(width: int, is_drafted: bool) -> float:
        factor = 1 + (wide - 1) * (width > 2)
        return speed * (factor * costs.verify_seconds[width - 1] + is_drafted * draft * costs.draft_seconds)

    return seconds_of


def draft(pace: Pace, plan: Plan, right: int, confidences=SURE, seconds_of=None, noise=lambda: 1.0, lookups=None):
    """Take a step that drafts; return its width and seconds.

    Args:
        pace: makes the choices.
        plan: of this step.
        right: number of drafted tokens that are right.
        confidences: what the drafter says.
        seconds_of: the machine's seconds of a step, by its width and whether it drafts; those of the pace by default.
        noise: factor of the seconds that the pace sees.
        lookups: what is found for the tokens; by default they stood nowhere before.
    """
    width, promised = pace.choose_width(plan, confidences)
    accepted = min(right, width - 1)
    seconds = (seconds_of or costs_of(pace.costs))(width, True)
    lookups = lookups or [(0, False)] * (accepted + 1)
    pace.learn_drafting(plan, width, accepted, promised=promised, seconds=seconds * noise(), lookups=lookups)
    return width, seconds


def run(pace: Pace, steps: int, draw, *, seconds_of=None, noise=lambda: 1.0, copies=lambda: []) -> tuple[float, int]:
    """Decode; return tokens in the seconds of a plain step, and the number of drafts.

    `draw` gives the confidences of a step and how many of the next tokens are right; the others are those of `draft`.
    """
    seconds_of = seconds_of or costs_of(pace.costs)
    seconds, tokens, drafts = 0.0, 0, 0
    for _ in range(steps):
        confidences, right = draw()
        plan = pace.plan(copies())
        if plan.is_drafted:
            width, cost = draft(pace, plan, right, confidences, seconds_of, noise)
        else:
            width, cost = plan.width, seconds_of(plan.width, False)
            pace.learn_plain(cost * noise(), width)
        pace.learn_copying(plan, [1] * right + [2])
        seconds += cost
        tokens += min(right, width - 1) + 1
        drafts += plan.is_drafted
    return tokens * seconds_of(1, False) / seconds, drafts


def always(right: int, confidence: float = 0.9):
    return lambda: ([confidence] * 7, right)


def learn_copies(pace: Pace, match: int, emitted: list[int]) -> None:
    """Copy seven times the token 1."""
    for _ in range(40):
        pace.learn_copying(Plan(False, copies=[Copy(match, [1] * 7)]), emitted)


def count_drafts(pace: Pace, steps: int, *args) -> int:
    return sum(pace.plan(*args).is_drafted for _ in range(steps))


@pytest.mark.parametrize(("confidence", "most"), [(0.01, 12), (0.9, 30)])
def test_a_useless_drafter_costs_almost_nothing(confidence, most):
    """One that knows it is useless, and one that promises much: that takes some drafts to find out, but once only."""
    pace = Pace(COSTS)
    speed, drafts = run(pace, 200, always(0, confidence))
    assert speed > 0.95 and drafts <= most
    again, drafts = run(pace, 200, always(0, confidence))
    assert again > 0.985 and drafts <= 12


@pytest.mark.parametrize("best", [0.75, 0.95])
def test_a_drafter_that_is_right_as_often_as_it_says_gains_more_than_any_fixed_width(best):
    """Drafts of all kinds, from hopeless to sure: neither bad luck nor a weak stretch ends drafting."""
    rng, pace = random.Random(0), Pace(StepCosts([19.8, 20.5, 21.5, 22.5, 23.0, 23.5, 24.0, 25.0], 7.0))

    def draw() -> tuple[list[float], int]:
        confidences = [rng.uniform(0.05, best) * 0.85**k for k in range(7)]
        return confidences, next((k for k, c in enumerate(confidences) if rng.random() > c), 7)

    def fixed(width: int) -> float:
        tokens = sum(min(draw()[1], width - 1) + 1 for _ in range(2000)) / 2000
        return tokens * pace.costs.verify_seconds[0] / costs_of(pace.costs)(width, True)

    assert run(pace, 2000, draw)[0] > max(1.0, *(fixed(width) for width in range(2, 9)))


def test_costs_that_were_measured_wrong_are_corrected():
    """Drafts that would pay by the costs, and do not by what steps take; the same where all steps take longer."""
    costs = StepCosts([20.0, 20.5, 21.0, 21.5, 22.0, 22.5, 23.0, 24.0], 5.0)
    rng, plain = random.Random(0), costs.verify_seconds[0]

    def slow_drafts(width: int, is_drafted: bool) -> float:
        return (1.5 if is_drafted else 1.0) * costs_of(costs)(width, is_drafted)

    speed, _ = run(Pace(costs), 1000, lambda: ([0.25] * 7, rng.choice([0, 0, 0, 1])), seconds_of=slow_drafts)
    assert speed > 0.97
    slow = Pace(costs)
    for _ in range(100):
        slow.learn_plain(2 * plain)
    assert run(slow, 200, always(7), seconds_of=costs_of(costs, speed=2.0))[1] > 190


def chain(right: float, rng: random.Random):
    """Each token is right at a rate, which the drafter says, and each second step could copy as many."""

    def draw() -> tuple[list[float], int]:
        return [right] * 7, next((k for k in range(7) if rng.random() > right), 7)

    def copies() -> list[Copy]:
        return [Copy(3, [1] * 7)] if rng.random() < 0.5 else []

    return {"draw": draw, "copies": copies}


CHANGES = {
    "all steps are slower": {"speed": 2.0},
    "all steps are faster": {"speed": 0.5},
    "wide passes are slower": {"wide": 2.0},
    "drafts are slower": {"draft": 2.0},
    "drafts are faster": {"draft": 0.5},
    "all is four times slower, and drafts ten": {"speed": 4.0, "draft": 2.5},
}


@pytest.mark.parametrize("right", [0.55, 0.8])
@pytest.mark.parametrize("change", CHANGES)
def test_costs_that_change_in_the_middle_are_learned(change, right):
    """After some steps of the changed machine, a pace that knew the old one is as fast as one that measured the new."""
    seconds_of, first = costs_of(COSTS, **CHANGES[change]), chain(right, random.Random(0))
    pace = Pace(COSTS)
    run(pace, 1000, **first)
    run(pace, 300, seconds_of=seconds_of, **first)
    known = Pace(StepCosts([seconds_of(w, False) for w in range(1, 9)], seconds_of(1, True) - seconds_of(1, False)))
    run(known, 1300, seconds_of=seconds_of, **first)
    speed, best = (
        run(each, 3000, seconds_of=seconds_of, **chain(right, random.Random(1)))[0] for each in (pace, known)
    )
    assert speed > 0.97 * best


@pytest.mark.parametrize("right", [0.4, 0.55, 0.8])
def test_noise_decides_nothing(right):
    """Where the seconds of steps vary and are often disturbed, and costs stay, the choices stay as good."""
    rng, noisy, quiet = random.Random(2), Pace(COSTS), Pace(COSTS)

    def noise() -> float:
        return rng.gauss(1, 0.15) * (8 if rng.random() < 0.1 else 1)

    seconds_of = costs_of(COSTS)
    run(noisy, 2000, seconds_of=seconds_of, noise=noise, **chain(right, random.Random(0)))
    found, _ = run(noisy, 3000, seconds_of=seconds_of, noise=noise, **chain(right, random.Random(1)))
    run(quiet, 2000, seconds_of=seconds_of, **chain(right, random.Random(0)))
    assert found > 0.98 * run(quiet, 3000, seconds_of=seconds_of, **chain(right, random.Random(1)))[0]
    assert quiet.draft_costs.verify_seconds == pytest.approx(COSTS.verify_seconds)


def test_a_drafter_that_gets_good_is_found_again():
    pace = Pace(COSTS)
    run(pace, 150, always(0))
    speed, _ = run(pace, 400, always(7))
    assert speed > 2.5


def test_what_is_copied_is_verified_as_far_as_it_was_right():
    pace = Pace(COSTS)
    run(pace, 50, always(0))  # a useless drafter
    for match, emitted in ((1, [2, 1, 1]), (2, [1, 1, 2]), (3, [1] * 8)):
        learn_copies(pace, match, emitted)
    assert pace.copy_rates[1][0].value < 0.03
    assert pace.copy_rates[2][1].value == pytest.approx(0.5, abs=0.05)
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
    for _ in range(150):
        for match, accepted in ((0, 7), (1, 0)):
            plan = pace.plan([Copy(match)])
            if plan.is_drafted:
                draft(pace, plan, accepted)
    assert pace.plan().is_drafted and count_drafts(pace, 100, [Copy(1)]) < 4


def test_drafting_what_would_have_been_copied_is_worth_little():
    """A drafter that is right only where copying is right loses to copying; one that is right elsewhere does not."""
    for is_copyable, counts in ((True, range(1, 4)), (False, [100])):
        pace = Pace(COSTS)
        learn_copies(pace, 3, [1] * 8)
        for _ in range(60):
            plan = pace.plan()
            if plan.is_drafted:
                lookups = [(0, False), (3, is_copyable), (3, is_copyable)]
                draft(pace, plan, 2, lookups=lookups)
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
