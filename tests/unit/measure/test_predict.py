import random
from dataclasses import replace

import pytest

from dpace.config import BenchConfig
from dpace.decode.costs import StepCosts
from dpace.decode.generation import Generation
from dpace.measure.benchmark import bench
from dpace.measure.predict import NUM_REPEATS, measure_together, predict_speedups, tokens_at
from dpace.measure.results import Prediction
from dpace.prompts.prompts import Prompt
from dpace.report.plots import describe_errors
from dpace.report.tables import console, drafters_table, predictions_table
from tests.conftest import make_drafter
from tests.support.rows import make_plain, make_response, make_row


def test_prediction_by_hand():
    """Accepted lengths 0 and 2 in blocks of 3: whole drafts emit 2 tokens in 4 s, plain decoding one in 1.5 s."""
    ours = make_response(histogram=[1, 0, 1], decode_seconds=8.0, decode_tokens=4)
    row = make_row(responses=[ours], plain_responses=[make_plain(decode_seconds=6.0, decode_tokens=4)])
    single_costs = StepCosts([1.0, 2.0, 3.0], 1.0)
    costs = {1: single_costs, 2: StepCosts([2.0, 6.0, 8.0], 1.0)}
    cut = 1.5 * 1.5 / (4.0 * 3 / 4)  # cut to one draft token: 1.5 tokens, in 3 of the 4 parts of the time
    assert predict_speedups(row, single_costs) == pytest.approx([cut, 2 * 1.5 / 4.0])
    pair = [1.5 * 3.0 / (4.0 * 7 / 4), 2 * 3.0 / (4.0 * 9 / 4)]
    assert predict_speedups(row, single_costs, costs, 2) == pytest.approx(pair)  # the response beside itself
    reading = StepCosts([1.0, 2.0, 3.0], 1.0, 2.0)  # as long at any width: 0.8 * (2 + 8 / 3 * 3) s for 4 tokens
    assert predict_speedups(row, reading) == pytest.approx([0.5 * 1.5, 0.5 * 1.5])
    # one verification ended the text and has no bonus token
    row = replace(row, responses=[replace(ours, num_without_bonus=1, decode_tokens=3)])
    assert predict_speedups(row, single_costs) == pytest.approx([0.75 * 1.5 * 1.5 / 3, 1.5 * 1.5 / 4])


def test_rows_that_are_done_leave_their_group():
    """8 and 4 tokens together: plain, four steps of both rows, four of one; drafted, one step of both, one of one."""
    ours = [make_response(histogram=[0, 0, 0, n], decode_seconds=3.0 * n, decode_tokens=4 * n) for n in (2, 1)]
    plain = [make_plain(decode_seconds=1.0 * r.decode_tokens, decode_tokens=r.decode_tokens) for r in ours]
    row = make_row(block_size=4, responses=ours, plain_responses=plain)
    costs = {1: StepCosts([1.0, 1.0, 1.0, 2.0], 1.0), 2: StepCosts([1.5, 2.0, 3.0, 4.0], 1.0)}
    expected = (12 / (5.0 + 3.0)) / (12 / (4 * 1.5 + 4 * 1.0))
    assert predict_speedups(row, costs[1], costs, 2)[-1] == pytest.approx(expected)


@pytest.mark.parametrize("counts", [[5, 3, 2, 1, 4], [1, 0, 0, 0, 9], [7, 1, 0, 0, 0], [0, 0, 0, 0, 3]])
def test_tokens_of_narrow_verifications_are_those_of_the_process(counts):
    """Against running it: a block is right to where its run ended, and goes on where that run ended with its block."""
    rng, size = random.Random(0), len(counts)
    for width in range(2, size + 1):
        tokens, at_least, end = 0, 0, None
        for _ in range(20_000):
            right = end if end is not None else rng.choices(range(at_least, size), counts[at_least:])[0]
            tokens += min(right, width - 1) + 1
            is_inside = right >= width
            at_least = right - width if is_inside else 0
            end = at_least if is_inside and (end is not None or right < size - 1) else None
        assert tokens_at(width, counts) == pytest.approx(tokens / 20_000, rel=0.02), width
    assert tokens_at(size, counts) == pytest.approx(sum((k + 1) * n for k, n in enumerate(counts)) / sum(counts))


@pytest.fixture(scope="module")
def results(language_target, language_drafter, language_prompts, tmp_path_factory):
    drafters = {"good": language_drafter, "bad": make_drafter(language_target, block_size=language_drafter.block_size)}
    prompts = [
        Prompt(str(i), "s", [[{"role": "user", "content": text}]]) for i, text in enumerate(language_prompts[50:54])
    ]
    config = BenchConfig(
        max_new_tokens=24, temperatures=(0.0,), widths=("full", 2, 3), predict=True, concurrencies=(1, 2)
    )
    return bench(language_target, drafters, prompts, config, tmp_path_factory.mktemp("bench"))


def test_accepted_lengths_of_a_width_are_those_of_whole_drafts_cut(results):
    """So that emitted tokens a step can be predicted from the histogram of whole drafts, up to where blocks begin."""
    rows = {row.width: row for row in results.rows if row.drafter == "good"}
    for width in (2, 3):
        assert rows[width].num_same_text == rows[width].num_responses == 4
        assert sum(rows[width].histogram[width:]) == 0 < sum(rows[width].histogram[1:width])
        assert rows[width].tau <= rows["full"].tau


def test_predictions_stand_beside_what_was_measured(results):
    for_good = [p for p in results.predictions if p.drafter == "good"]
    assert [p.concurrency for p in for_good] == [1, 2]
    one, two = for_good
    size = len(one.widths) + 1
    assert [found is not None for found in one.measured] == [width in (2, 3, size) for width in range(2, size + 1)]
    assert one.measured[-1] == results.rows[0].decode_speedup
    assert one.speedups[-1] == pytest.approx(one.measured[-1])  # what the others are relative to
    assert two.measured[:-1] == [None] * (size - 2)  # whole drafts are what batches verify
    assert two.measured[-1] > 0


def test_several_at_once_are_measured_in_groups(language_target, language_drafter, monkeypatch, capsys):
    """Tokens a second over those of plain decoding; no group that does not fit or that a set is too small for."""
    calls = []

    def fake(target, drafter, rows, *, max_new_tokens, **_):
        if len(rows) == 3:
            raise ValueError("no room")
        calls.append((drafter is not None, len(rows), max_new_tokens))
        seconds = 1.0 if drafter else 2.5
        return [Generation([0] * (max_new_tokens + 1), [], [], [], 1, 0.0, seconds) for _ in rows]

    monkeypatch.setattr("dpace.measure.predict.generate_batch", fake)
    prompts = [Prompt(str(i), "s", [[{"role": "user", "content": "w1 w50"}]]) for i in range(5)]
    config = BenchConfig(max_new_tokens=20, temperatures=(0.0,), concurrencies=(1, 2, 3, 8))
    found = measure_together(language_target, {"d": language_drafter}, prompts, config, {"s": 64})
    assert found.speedups == {("d", "s", 0.0, 2): 2.5}
    assert list(found.costs["d", "s", 0.0, 8]) == [1, 2, 3, 4, 8]  # too few prompts to measure, but predicted
    assert calls[:2] == [(False, 2, 8), (True, 2, 8)]  # a warm-up
    assert sorted(calls[2:]) == [(side, 2, 20) for side in (False, True) for _ in range(2 * NUM_REPEATS)]
    assert "3 prompts of s at once were not measured: no room" in capsys.readouterr().err


def test_the_page_says_how_far_off(results):
    def prediction(concurrency, speedups, measured):
        where = {"drafter": "d", "set": "s", "temperature": 0.0, "concurrency": concurrency, "widths": [2, 3]}
        return Prediction(**where, speedups=speedups, measured=measured)

    ones = [prediction(1, [1.1, 9.0], [1.0, 1.0])]  # whole drafts of one prompt are no prediction
    assert "The 1 predictions that were also measured are off by 10.0% on average" in describe_errors(ones)
    assert "2 predictions" in describe_errors([*ones, prediction(2, [1.0, 0.8], [None, 1.0])])
    assert not describe_errors([prediction(2, [1.0, 1.0], [None, None])])


def test_a_drafter_that_loses_is_not_to_be_used(results):
    from io import StringIO

    def lines(table) -> list[str]:
        out = console()
        out.file = StringIO()
        out.print(table)
        return out.file.getvalue().splitlines()

    predictions = [replace(p, speedups=[0.9] * len(p.speedups)) for p in results.predictions]
    predictions[0].speedups[1] = 1.3
    text = lines(predictions_table(predictions))
    assert sum("do not use" in line for line in text) == len(predictions) - 1 and any(
        "width 3" in line for line in text
    )
    assert any("bad" in line for line in lines(drafters_table(results.comparisons)))


def test_drafters_are_compared_with_the_first(results):
    assert {(c.drafter, c.baseline) for c in results.comparisons} == {("bad", "good")}
    assert all(c.tau_gain[0] < 0 and c.tau_gain[2] < 0 for c in results.comparisons)
