"""Finished responses are kept on disk, and a benchmark goes on after them."""

from dataclasses import fields, replace

import pytest

from dpace.measure.records import Provenance, ResponseRecords, ServedRecords, ServerAddress, ServerSetup
from dpace.system.provenance import Hardware
from tests.support.files import make_prompts
from tests.support.rows import make_bench, make_plain, make_response

SETUP = Provenance(**{field.name: getattr(make_bench(), field.name) for field in fields(Provenance)})
PROMPTS = make_prompts("xx")
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
    assert ResponseRecords(path, SETUP, PROMPTS).rows == third.rows  # and leave the old ones where they are


@pytest.mark.parametrize(
    "change",
    [
        {"target_weights_sha256": "0" * 64},
        {"drafter_configs": {"dpace": "0" * 64}},
        {"seed": 1},
        {"hardware": Hardware(device="another", cores=2, torch_threads=2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_records_of_another_measurement_are_neither_taken_nor_lost(change, tmp_path):
    path = tmp_path / "bench.jsonl"
    ResponseRecords(path, SETUP, PROMPTS).add(make_plain())
    other = ResponseRecords(path, replace(SETUP, **change), PROMPTS)
    assert other.rows == []
    other.add(make_plain(id="1"))
    assert ResponseRecords(path, SETUP, PROMPTS).rows == [make_plain()]
    assert ResponseRecords(path, replace(SETUP, **change), PROMPTS).rows == [make_plain(id="1")]


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "servers.jsonl"
    setup = ServerSetup(
        target="t", servers={"drafter": ServerAddress(url="http://x", engine="vllm")}, max_new_tokens=4, seed=0
    )
    written = ServedRecords(path, setup, PROMPTS).path
    with written.open("a") as file:
        file.write('{"set": "s"}\n')
    with pytest.raises(ValueError, match=r"servers-\w{8}.jsonl:2: .* missing, expected .*; remove the line"):
        ServedRecords(path, setup, PROMPTS)
