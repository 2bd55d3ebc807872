"""Finished responses are kept on disk, and a benchmark goes on after them."""

import pytest

from dpace.data.prompts import Prompt
from dpace.measure.records import Records, ResponseRecords
from dpace.measure.results import BenchSetup, ServerAddress, ServerSetup
from dpace.measure.rows import GroupRecord
from tests.rows import make_plain, make_response

SETUP = BenchSetup(target="t", drafters={}, max_new_tokens=4, seed=0)
PROMPTS = [Prompt(str(i), "s", [[{"role": "user", "content": "x"}]]) for i in range(2)]
WAYS = [("plain", None), ("dpace", "full")]


def test_records_go_on(tmp_path):
    path = tmp_path / "bench.jsonl"
    records = ResponseRecords(path, SETUP, PROMPTS)
    for record in (make_plain(), make_response(), make_plain(id="1")):
        records.add(record)
    again = ResponseRecords(path, SETUP, PROMPTS)
    assert again.rows == records.rows == [make_plain(), make_response(), make_plain(id="1")]
    assert again.has(WAYS, 0.0, PROMPTS[0]) and not again.has(WAYS, 0.0, PROMPTS[1])
    assert not again.has([*WAYS, ("dpace", 2)], 0.0, PROMPTS[0]) and not again.has(WAYS, 1.0, PROMPTS[0])
    for record in (make_plain(id="1", decode_seconds=9.0), make_response(id="1")):  # measured again as a whole
        again.add(record)
    third = ResponseRecords(path, SETUP, PROMPTS)
    assert third.has(WAYS, 0.0, PROMPTS[1])
    assert [r.decode_seconds for r in third.of([0.0], PROMPTS[1:])] == [9.0, 1.0]
    assert ResponseRecords(path, SETUP, PROMPTS[:1]).rows == []  # other prompts begin again


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "servers.jsonl"
    setup = ServerSetup(
        target="t", servers={"drafter": ServerAddress(url="http://x", engine="vllm")}, max_new_tokens=4, seed=0
    )
    Records(path, setup, PROMPTS, GroupRecord)
    with path.open("a") as file:
        file.write('{"set": "s"}\n')
    with pytest.raises(ValueError, match=r"servers.jsonl:2: .* missing, expected .*; remove the line"):
        Records(path, setup, PROMPTS, GroupRecord)
