"""A model card names a verification length only where an interval says that it gains."""

from dataclasses import replace

import pytest

from dpace.engines.card import NO_GAIN, UNKNOWN, best_lengths, served_lengths
from tests.support.rows import make_bench, make_row, make_served, make_servers

FASTER, SLOWER, UNCLEAR, FEW = (1.1, 1.4), (0.5, 0.9), (0.9, 1.2), (None, None)


def advice(*rows, **changes):
    return list(best_lengths(replace(make_bench(*rows), **changes), ["dpace"]))


@pytest.mark.parametrize(
    ("whole", "auto", "best"),
    [
        ((1.3, FASTER), (1.2, FASTER), "3, whole drafts"),
        ((1.3, FASTER), (1.4, FASTER), "auto"),
        ((1.5, UNCLEAR), (1.2, FASTER), "auto"),
        ((0.7, SLOWER), (1.1, UNCLEAR), NO_GAIN),
        ((2.0, FEW), (1.2, FEW), UNKNOWN),
    ],
)
def test_the_fastest_length_with_a_gain_is_chosen(whole, auto, best):
    rows = [
        make_row(width=width, decode_speedup=speedup, decode_speedup_interval=ends)
        for width, (speedup, ends) in {"full": whole, "auto": auto}.items()
    ]
    other = make_row(drafter="other", decode_speedup=9.0, decode_speedup_interval=FASTER)
    (found,) = advice(*rows, other)
    assert found[:5] == ("dpace", "s", 0.0, "1", best)


@pytest.mark.parametrize(("ends", "best"), [(FASTER, "3"), (UNCLEAR, NO_GAIN), (FEW, UNKNOWN)])
def test_a_server_has_the_length_that_it_ran_with(ends, best):
    row = make_served(
        concurrency=8, histogram=[1, 0, 1], decode_speedup=1.2, decode_speedup_interval=ends, num_same_text=1
    )
    results = make_servers(row)
    (found,) = served_lengths(results)
    assert found[:5] == ("vllm", "s", 0.0, "8", best)
    server = replace(results.servers["drafter"], engine="sglang")
    (other,) = served_lengths(replace(results, servers={**results.servers, "drafter": server}))
    expected = "as it was started" if best == "3" else best
    assert other.best == expected, "SGLang's histogram ends at the longest accepted draft"
    (warm,) = served_lengths(replace(results, rows=[replace(row, prefix="warm")]))
    assert warm.at_once == "8, warm", "two rows of one situation are told apart"
    assert not list(served_lengths(replace(results, rows=[replace(row, decode_speedup=None)])))
