"""Finished responses are kept on disk, and a benchmark goes on after them."""

from dataclasses import fields, replace

import pytest

from dpace.measure.records import Provenance, Records, ResponseRecord
from tests.support.files import make_prompts
from tests.support.rows import make_bench, make_plain, make_response

SETUP = Provenance(**{field.name: getattr(make_bench(), field.name) for field in fields(Provenance)})
PROMPTS = make_prompts("xx")


def open_records(folder, setup=SETUP, prompts=PROMPTS):
    return Records(folder / "bench.jsonl", ResponseRecord, setup, prompts)


def test_records_go_on_and_the_last_ones_count(tmp_path):
    records = open_records(tmp_path)
    for record in (make_plain(), make_response(), make_plain(decode_seconds=9.0), make_response(turn=1)):
        records.add(record)
    found = open_records(tmp_path).rows
    assert found == records.rows and found[0.0, "0", 0, "plain", None].decode_seconds == 9.0 and len(found) == 3


@pytest.mark.parametrize("other", [(replace(SETUP, seed=1), PROMPTS), (SETUP, PROMPTS[:1])])
def test_records_of_another_measurement_are_neither_taken_nor_lost(other, tmp_path):
    open_records(tmp_path).add(make_plain())
    assert not open_records(tmp_path, *other).rows
    open_records(tmp_path, *other).add(make_plain(id="1"))
    found = [open_records(tmp_path), open_records(tmp_path, *other)]
    assert [[record.id for record in records.rows.values()] for records in found] == [["0"], ["1"]]


def test_a_line_that_is_no_record_is_named(tmp_path):
    with open_records(tmp_path).path.open("a") as file:
        file.write('{"set": "s"}\n')
    with pytest.raises(ValueError, match=r"bench-\w{8}.jsonl:2: .* is missing.*; remove the line"):
        open_records(tmp_path)
