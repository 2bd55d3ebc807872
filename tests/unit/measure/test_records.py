"""Finished responses are kept on disk, and a benchmark goes on after them."""

from dataclasses import fields

import pytest

from dpace.measure.records import Records
from dpace.measure.results import BenchRecord, Provenance
from dpace.prompts.prompts import Prompt
from tests.support.files import make_prompts
from tests.support.rows import make_bench, make_response

SETUP = Provenance(**{field.name: getattr(make_bench(), field.name) for field in fields(Provenance)})


def open_records(folder):
    return Records(folder / "bench.jsonl", BenchRecord, SETUP, make_prompts("xx"))


def record(name: str = "0", **changes) -> BenchRecord:
    return BenchRecord(set="s", id=name, temperature=0.0, responses=[make_response(id=name, **changes)])


def test_records_go_on_and_the_last_ones_count(tmp_path):
    records = open_records(tmp_path)
    for one in (record("0"), record("0", decode_seconds=9.0), record("1")):
        records.add(one)
    again = open_records(tmp_path)
    assert again.rows == records.rows and again.rows[0.0, "0"].responses[0].decode_seconds == 9.0
    jobs = [(temperature, Prompt(name, "s", [])) for temperature in (0.0, 1.0) for name in "01"]
    assert again.missing(jobs) == [(2, jobs[2]), (3, jobs[3])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"set": "s"}', ".* is missing"),
        (
            '{"set": "s", "id": "0", "temperature": 0.0, "responses": []}',
            r"responses is \[\], expected List should have at least 1 item",
        ),
    ],
)
def test_a_line_that_is_no_record_is_named(line, reason, tmp_path):
    with open_records(tmp_path).path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=rf"bench-\w{{8}}.jsonl:2: {reason}.*; remove the line"):
        open_records(tmp_path)
