"""Tables fit 80 columns with the verdict first, whatever the names are."""

import re
from dataclasses import replace

import pytest

from dpace.report.sections import comparison, depths, pairs, servers, slots, speeds
from dpace.report.tables import Section, console, section_table
from tests.support.rows import (
    make_bench,
    make_compare,
    make_compared,
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
        tau=(12.34, *INTERVAL),
        decode_speedup=(10.0, *INTERVAL),
        tokens_per_second=1234.5,
        num_same_text=880,
        num_responses=880,
        share_copied=0.5,
        width="auto",
    )
    yield speeds(make_bench(row, row))
    yield slots([row])
    yield pairs([make_row(), make_row(**NAMES, tau_gain=GAIN, speed_ratio=(1.1, *INTERVAL))])
    compared = make_compared(**NAMES, tau=(2.0, *INTERVAL), gain=GAIN)
    yield comparison(make_compare(compared))
    served = make_served(
        set=NAMES["set"],
        temperature=0.6,
        tau=(12.34, *INTERVAL),
        tau_here=(12.34, *INTERVAL),
        tau_over_here=GAIN,
        tokens_per_second=1234.5,
        plain_tokens_per_second=1234.5,
        num_same_text=880,
        control_same_text=880,
        num_responses=880,
    )
    yield servers(make_servers(served))
    depth = replace(
        served, depth="15@0.75", num_verifications=1000, num_drafted=12345, decode_speedup=(12.34, *INTERVAL)
    )
    yield depths(make_servers(depth))


@pytest.mark.parametrize("table", list(tables()), ids=lambda table: table.title)
def test_tables_fit_80_columns_with_the_verdict_first(table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    console().print(section_table(table))
    printed = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines())
    for number, cell in enumerate(table.rows[0].values()):
        for word in re.split(r" (?=[\[(])", cell) if number >= table.num_texts else ():
            assert f"{word} " in printed.replace("\n", " \n"), "a number is cut"
    assert "verdict" not in table.rows[0] or re.search(r"^ not ", printed, re.MULTILINE)


@pytest.mark.parametrize(("words", "interval"), [(1, " [1.00, 9.00]"), (11, "\n[1.00, 9.00]")])
def test_an_interval_has_a_line_of_its_own_where_the_table_is_too_wide(words, interval, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"name": "a (b) " * words, "tau [95 %]": f"{tau} [1.00, 9.00]"} for tau in ("2.00", "3.00")]
    console().print(section_table(Section("title", rows=rows, note="below")))
    printed = re.sub(r" *\n *", "\n", capsys.readouterr().out)
    assert f"2.00{interval}" in printed and f"3.00{interval}" in printed and "\nbelow\n" in printed


def test_rows_say_what_they_know():
    """How much was copied, and texts that are to be kept; a shorter block has no cells for the last slots."""
    sampled = make_row(temperature=1.0, verify_rule="speculative")
    rows = speeds(make_bench(make_row(share_copied=0.25, width="auto", num_same_text=0), sampled)).rows
    assert [row["width"] for row in rows] == ["auto 25% copied", "full"]
    assert [row["same text"] for row in rows] == ["0/1", "-"]
    first, second = slots([make_row(reach_rate=[0.5], block_size=2), make_row(reach_rate=[1.0] * 3, block_size=4)]).rows
    assert [*first.values()][3:] == ["50", "", ""] and [*second.values()][3:] == ["100"] * 3
    ours, base = make_compared(), make_compared(drafter="dflash")
    cells = [" ".join(row.values()) for row in comparison(make_compare(ours, base)).rows]
    assert cells == [
        "not clear s dpace 2.00 [1.50, 2.50] +10.0 % [+0.0, +20.0]",
        "baseline s dflash 2.00 [1.50, 2.50] -",
    ]


@pytest.mark.parametrize(
    ("seeds", "gain", "expected"),
    [
        ([0], (-0.005, -0.009, -0.001), "one seed"),
        ([0], (0.04, 0.01, 0.07), "better"),
        ([0, 1], (-0.005, -0.009, -0.001), "worse"),
        ([0], (None, None, None), "too few prompts"),
    ],
)
def test_under_3_percent_one_seed_gets_no_verdict(seeds, gain, expected):
    table = comparison(make_compare(make_compared(gain=gain), seeds=seeds))
    assert table.rows[0]["verdict"] == expected
    assert "Student's t where there are several seeds. With one seed" in table.text
