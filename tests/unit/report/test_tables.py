"""Tables fit 80 columns with the verdict first, whatever the names are; advice follows from the verdicts."""

import re
from dataclasses import replace

import pytest

from dpace.measure.results import Comparison
from dpace.report.cells import advice
from dpace.report.page import comparison, servers, speeds, tables_of
from dpace.report.tables import console, section_table, slots_table
from tests.support.rows import (
    make_bench,
    make_compare,
    make_compared,
    make_response,
    make_row,
    make_served,
    make_servers,
)

INTERVAL = (0.987, 12.345)
NAMES = {"set": "speed_bench/multilingual", "drafter": "dpace+lk+overlap", "temperature": 0.6}
GAIN = (0.1234, -0.0567, 0.2345)


def tables():
    """One of each kind, with long names, blocks of 16 and two-digit speedups."""
    row = make_row(
        **NAMES,
        block_size=16,
        reach_rate=[1.0] * 15,
        responses=[make_response(prompt_tokens=3000, histogram=[1] * 16)],
        tau=12.34,
        tau_interval=INTERVAL,
        decode_speedup=10.0,
        decode_speedup_interval=INTERVAL,
        tokens_per_second=1234.5,
        num_same_text=880,
        num_responses=880,
        share_copied=0.5,
        width="auto",
    )
    bench = make_bench(row, row)
    yield "no clear difference", section_table(speeds(bench))
    yield "0.6", slots_table(make_bench(replace(row, width="full")))
    pair = Comparison(**NAMES, width="full", baseline="dflash", tau_gain=GAIN, speed_ratio=(1.1, *INTERVAL))
    yield "no clear difference", section_table(list(tables_of(make_bench(comparisons=[pair])))[1])
    compared = make_compared(
        **NAMES, tau_interval=INTERVAL, gain=GAIN, gain_by_seed=[0.1, None, 0.1], peak_memory_bytes=2**34
    )
    yield "no clear difference", section_table(comparison(make_compare(compared, decode=bench)))
    served = make_served(
        set=NAMES["set"],
        temperature=0.6,
        tau=12.34,
        tau_interval=INTERVAL,
        tau_here=(12.34, *INTERVAL),
        tau_over_here=GAIN,
        tokens_per_second=1234.5,
        plain_tokens_per_second=1234.5,
        num_same_text=880,
        control_same_text=880,
        num_responses=880,
    )
    yield "no clear difference", section_table(servers(make_servers(served)))


@pytest.mark.parametrize("cell, table", list(tables()))
def test_tables_fit_80_columns_with_the_verdict_first(cell, table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    console().print(table)
    printed = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines()) and "…" not in printed
    assert cell in printed and (cell == "0.6" or re.search(rf"^ {cell} ", printed, re.MULTILINE))


def test_advice_follows_from_the_verdicts():
    def results(**intervals):
        return make_bench(*(make_row(set=name, decode_speedup_interval=ends) for name, ends in intervals.items()))

    mixed = results(a=(1.1, 1.3), b=(0.7, 0.9))
    assert "on a, but not clearly on b: measure more prompts there" in advice(mixed)
    assert advice(results(a=(1.1, 1.3))) == "faster than plain decoding on a"
    assert "nothing here is faster than plain decoding: decode without this drafter" in advice(results(a=(0.7, 0.9)))
    assert "nothing here is clearly faster" in advice(results(a=(0.7, 0.9), b=(0.9, 1.1)))
    assert "measure more prompts" in advice(results(a=(None, None)))
