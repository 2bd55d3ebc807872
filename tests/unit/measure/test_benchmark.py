"""A benchmark of two drafters with several widths, and what its rows say."""

import pytest

from dpace.config import BenchConfig
from dpace.measure.benchmark import bench, hash_config
from dpace.measure.pooling import make_rows, pool_seeds
from dpace.measure.results import read_results
from dpace.metrics import MIN_PROMPTS, Acceptance
from dpace.prompts.prompts import Prompt
from tests.conftest import make_drafter, make_target
from tests.support.files import make_prompts
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


def test_widths_and_drafters_are_compared(measure, language_drafter, other):
    """A narrow verification accepts less; every drafter is compared with the first."""
    results = measure({"good": language_drafter, "bad": other}, widths=("full", 2, 3), max_new_tokens=24)
    rows = {row.width: row for row in results.rows if row.drafter == "good"}
    for width in (2, 3):
        assert rows[width].num_same_text == rows[width].num_responses == 6
        assert sum(rows[width].histogram[width:]) == 0 < sum(rows[width].histogram[1:width])
        assert rows[width].tau <= rows["full"].tau
    assert {(c.drafter, c.baseline) for c in results.comparisons} == {("bad", "good")}
    assert all(c.tau_gain[0] < 0 and c.tau_gain[2] < 0 for c in results.comparisons)


def test_rules_are_compared_on_the_same_prompts(measure, language_drafter):
    """One command gives both rows, paired; the default rule has no name of its own."""
    results = measure({"d": language_drafter}, temperatures=(2.0,), verify_rules=("equality", "speculative"))
    assert [row.drafter for row in results.rows] == ["d", "d, speculative"] == list(results.drafters)
    assert [row.num_same_text == 6 for row in results.rows] == [True, False]
    (comparison,) = results.comparisons
    assert (comparison.drafter, comparison.baseline) == ("d, speculative", "d") and None not in comparison.tau_gain
    assert all(row.tau > 1 for row in results.rows) and len(set(results.drafters.values())) == 1


def test_a_second_call_keeps_the_rows_of_the_first(measure, language_drafter, other, tmp_path, capsys):
    """Where settings or the weights of a drafter differ, the first results get another name."""

    def rows_with(drafter, **options):
        results = measure({"d": drafter}, num_prompts=2, **options)
        assert read_results(tmp_path / "results.json") == results
        return [(row.drafter, row.width) for row in results.rows]

    rows_with(language_drafter)
    rows_with(language_drafter, verify_rules=("speculative",), temperatures=(1.0,))
    assert rows_with(language_drafter, widths=(2,)) == [("d", "full"), ("d, speculative", "full"), ("d", 2)]
    assert "other settings" not in capsys.readouterr().err
    for length, num_aside in ((16, 1), (9, 2)):
        assert rows_with(other, widths=(3,), max_new_tokens=length) == [("d", 3)]
        assert "results of other settings, which are now in results-" in capsys.readouterr().err
        assert len([*tmp_path.glob("results-*.json")]) == num_aside


def test_the_hash_of_a_config_stays_so_that_kept_answers_are_taken():
    assert hash_config(make_drafter(make_target("llama3.1"))).startswith("ef07aa12")


@pytest.mark.parametrize("num_prompts", [3, 6])
def test_turns_are_drawn_with_their_prompt(num_prompts):
    """Two turns of a prompt say no more of other prompts than one that is twice as long."""
    config = BenchConfig(temperatures=(0.0,), widths=("full",))

    def measure(num_turns: int, **counts):
        records = {}
        for number, speed in enumerate([1.0, 2.0, 4.0, 1.5, 3.0, 2.5][:num_prompts]):
            for turn in range(num_turns):
                place = {"id": str(number), "turn": turn, "decode_tokens": 8 // num_turns}
                plain = make_plain(**place, decode_seconds=8 / num_turns)
                ours = make_response(**place, **counts, decode_seconds=8 / num_turns / speed)
                records |= {record.key: record for record in (plain, ours)}
        prompts = [Prompt(str(number), "s", [[]] * num_turns) for number in range(num_prompts)]
        (row,) = make_rows(records, prompts, config, ["dpace"])
        return row

    two, one = measure(2), measure(1, histogram=[2, 0, 2])
    assert two.num_responses == 2 * num_prompts and two.decode_speedup == one.decode_speedup
    assert two.decode_speedup_interval == one.decode_speedup_interval and two.tau_interval == one.tau_interval
    assert (two.decode_speedup_interval == (None, None)) is (num_prompts < MIN_PROMPTS)


def test_three_seeds_that_differ_show_no_gain():
    """7.1, 2.8 and 3.3 %: a bootstrap of the seeds gave [+2.8, +7.1]."""
    theirs = Acceptance([[5000, 5000]] * 8, 2)
    ours = [Acceptance([[5000 - more, 5000 + more]] * 8, 2) for more in (1065, 420, 495)]
    facts = {"set": "s", "drafter": "dpace", "num_prompts": 8, "temperature": 0.0}
    row = pool_seeds(ours, [theirs] * 3, **facts, step_seconds=None, peak_memory_bytes=None)
    assert row.gain == pytest.approx((0.044, -0.0145, 0.1025), abs=2e-4)
    assert row.tau_interval == pytest.approx((1.566 - 0.0877, 1.566 + 0.0877), abs=2e-4)
