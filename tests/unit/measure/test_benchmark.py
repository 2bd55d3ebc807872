"""A benchmark of two drafters with several widths, and what its rows say."""

import pytest

from dpace.config import BenchConfig
from dpace.measure.benchmark import bench, make_rows
from dpace.measure.results import BenchRecord, read_results
from dpace.metrics import MIN_PROMPTS
from tests.support.files import make_prompts, read_json
from tests.support.models import make_drafter
from tests.support.rows import make_plain, make_response


@pytest.fixture
def measure(language_target, language_prompts, tmp_path):
    """Measure drafters greedily, with whole blocks."""

    def measure(drafters, num_prompts=6, **options):
        config = BenchConfig(**{"max_new_tokens": 16, "temperatures": (0.0,), "widths": ("full",), **options})
        return bench(language_target, drafters, make_prompts(language_prompts[50:][:num_prompts]), config, tmp_path)

    return measure


@pytest.fixture
def other(language_target, language_drafter):
    return make_drafter(language_target, block_size=language_drafter.block_size)


def test_widths_and_drafters_are_compared(measure, language_drafter, other, tmp_path):
    """A narrow verification accepts less; every drafter is compared with the first one that the call names."""
    results = measure({"good": language_drafter, "bad": other}, widths=("full", 3), max_new_tokens=10)
    rows = {row.width: row for row in results.rows if row.drafter == "good"}
    narrow = rows[3]
    assert narrow.num_same_text == narrow.num_responses == 6
    assert sum(narrow.histogram[3:]) == 0 < sum(narrow.histogram[1:3])
    assert narrow.tau[0] <= rows["full"].tau[0]
    assert all(row.tau_gain == (0, 0, 0) and row.speed_ratio == (1, 1, 1) for row in rows.values())
    assert all(max(row.tau_gain) < 0 for row in results.rows if row.drafter == "bad")
    profile = read_json(tmp_path / "speculation_profile.json")
    assert profile["marginal_accept_rates"] == rows["full"].reach_rate and profile["measured"]
    first, *_ = measure({"bad": other, "good": language_drafter}, max_new_tokens=4).rows
    assert first.drafter == "bad" and first.tau_gain == (0, 0, 0)


def test_rules_are_compared_on_the_same_prompts(measure, language_drafter):
    """One command gives both rows, paired; the default rule has no name of its own."""
    results = measure({"d": language_drafter}, temperatures=(2.0,), verify_rules=("equality", "speculative"))
    assert [row.drafter for row in results.rows] == ["d", "d, speculative"] == list(results.drafters)
    assert [row.num_same_text == 6 for row in results.rows] == [True, False]
    assert None not in results.rows[1].tau_gain
    assert all(row.tau[0] > 1 for row in results.rows) and len(set(results.drafters.values())) == 1


def test_each_call_writes_its_own_rows_and_decodes_only_what_is_not_kept(
    measure, language_drafter, other, tmp_path, monkeypatch
):
    """Other settings, weights or prompts begin another file; the first call again decodes nothing."""

    def rows_with(drafter, **options):
        results = measure({"d": drafter}, **{"num_prompts": 2, **options})
        assert read_results(tmp_path / "results.json") == results
        return results.rows

    first = rows_with(language_drafter)
    others = {"widths": (2,)}, {"num_prompts": 1}, {"seed": 1}
    for drafter, options in [*((language_drafter, options) for options in others), (other, {})]:
        (row,) = rows_with(drafter, **options)
        assert row.width == options.get("widths", ("full",))[0]
    assert len([*tmp_path.glob("bench-*.jsonl")]) == 5
    monkeypatch.setattr("dpace.measure.benchmark.ask_in_turn", lambda *_, **__: pytest.fail("decoded again"))
    assert rows_with(language_drafter) == first


SPEEDS = [1.0, 2.0, 4.0, 1.5, 3.0, 2.5]


@pytest.mark.parametrize("num_prompts", [3, 6])
def test_turns_are_drawn_with_their_prompt(num_prompts):
    """Two turns of a prompt say no more of other prompts than one that is twice as long; speedups are of totals."""

    def measure(num_turns: int, **counts):
        records = []
        for number, speed in enumerate(SPEEDS[:num_prompts]):
            responses = []
            for turn in range(num_turns):
                place = {"id": str(number), "turn": turn, "token_ids": [0] * (1 + 8 // num_turns)}
                responses.append(make_plain(**place, decode_seconds=8 / num_turns))
                responses.append(make_response(**place, **counts, decode_seconds=8 / num_turns / speed))
            records.append(BenchRecord(set="s", id=str(number), temperature=0.0, responses=responses))
        (row,) = make_rows(records, {"dpace": "equality"})
        return row

    two, one = measure(2), measure(1, accepted_lengths=[0, 2, 0, 2], emitted_lengths=[1, 3, 1, 3])
    assert two.num_responses == 2 * num_prompts and two.decode_speedup == one.decode_speedup
    assert two.tau == one.tau
    assert one.decode_speedup[0] == pytest.approx(num_prompts / sum(1 / speed for speed in SPEEDS[:num_prompts]))
    assert (two.decode_speedup[1:] == (None, None)) is (num_prompts < MIN_PROMPTS)
