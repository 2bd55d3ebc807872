import numpy as np
import pytest

from dpace.metrics import MIN_PROMPTS, Acceptance, decode_speedup, published_speedup, published_tau, tau_gain

# accepted lengths 0, 0, 1, 3 in blocks of 4: emitted 1 + 1 + 2 + 4
HAND = Acceptance([2, 1, 0, 1], block_size=4)


def test_hand_counted():
    assert HAND.num_verifications == 4
    assert HAND.num_emitted_tokens == 8
    assert HAND.tau == 2.0
    assert HAND.acceptance_rate == pytest.approx(4 / 12)
    assert HAND.reach_rate.tolist() == [0.5, 0.25, 0.25]
    assert HAND.slot_acceptance_rate.tolist() == [0.5, 0.5, 1.0]


def test_a_verification_that_ends_in_a_stop_token_has_no_bonus():
    ended = Acceptance([2, 1, 0, 1], block_size=4, num_without_bonus=1)
    assert ended.tau == 7 / 4 and ended.without_bonus.tolist() == [1] and ended.total_without_bonus == 1


def test_rows_pool_to_the_same_numbers():
    rows = Acceptance.of_prompts([Acceptance.from_lengths([0, 3], 4), Acceptance.from_lengths([0, 1], 4)])
    assert rows.tau == HAND.tau and rows.counts.tolist() == [2, 1, 0, 1]


def test_interval_contains_tau_and_is_wider_for_unlike_prompts():
    alike = Acceptance([[5, 5, 0, 0]] * 20, 4)
    unlike = Acceptance([[10, 0, 0, 0], [0, 10, 0, 0]] * 10, 4)
    assert alike.tau == unlike.tau
    assert alike.interval() == (alike.tau, alike.tau)
    low, high = unlike.interval()
    assert low < unlike.tau < high


def test_one_prompt_gives_no_interval():
    """The verifications of one text say nothing of other texts."""
    assert np.isnan(HAND.interval()).all()
    gain, *ends = tau_gain([HAND], [HAND])
    assert gain == 0 and np.isnan(ends).all()


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    truth, hits = 1 + 0.5 + 0.25 + 0.125, 0
    for _ in range(200):
        rows = []
        for _ in range(40):
            lengths = [min(3, generator.geometric(0.5) - 1) for _ in range(10)]
            rows.append(Acceptance.from_lengths(lengths, 4))
        low, high = Acceptance.of_prompts(rows).interval(num_resamples=300)
        hits += low <= truth <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_no_verification():
    empty = Acceptance([0, 0], 2)
    assert np.isnan(empty.tau) and np.isnan(empty.interval()).all()


def test_wrong_length_is_refused():
    with pytest.raises(ValueError, match="block of 4"):
        Acceptance([1, 2], block_size=4)


def test_decode_speedup_is_a_ratio_of_totals():
    value, low, high = decode_speedup([10, 30] * 4, [1, 1] * 4, [10, 30] * 4, [2, 4] * 4)
    assert value == 3.0
    assert 2.0 <= low < 3.0 < high <= 4.0
    few = MIN_PROMPTS - 1
    assert decode_speedup([10] * few, [1] * few, [10] * few, [2] * few) == (2.0, None, None)
    value, low, high = decode_speedup([0] * 8, [1e-7] * 8, [0] * 8, [1e-7] * 8)
    assert np.isnan(value) and low is high is None


def test_tau_gain_is_paired():
    theirs = Acceptance([[8, 2], [2, 8]] * 5, 2)
    ours = Acceptance([[6, 4], [0, 10]] * 5, 2)
    gain, low, high = tau_gain([ours], [theirs])
    assert gain == pytest.approx(1.7 / 1.5 - 1)
    assert 0 < low <= gain <= high
    assert np.isnan(tau_gain([ours], [Acceptance(np.zeros((10, 2)), 2)])).all()
    with pytest.raises(ValueError, match="same seeds and prompts"):
        tau_gain([ours], [Acceptance([1, 1], 2)])


def test_published_definitions():
    """By hand: means of means, which the pooled numbers are not."""
    assert published_tau([[0, 0], [3], []]) == pytest.approx((1 + 4) / 2)
    assert published_speedup([10, 2], [1.0, 1.0], [10, 2], [2.0, 1.0]) == pytest.approx((0.2 + 0.5) / (0.1 + 0.5))
