"""results.json, servers.json and heldout.json are read as they were written, or refused in one line."""

import copy
import json
import os
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpace.measure.results import (
    BenchResults,
    ComparedRow,
    CompareResults,
    Comparison,
    Example,
    GroupRecord,
    Heldout,
    LlamacppRow,
    ServerAddress,
    ServerResults,
    ServerRow,
    SideRecord,
    find_results,
    read_heldout,
    read_log,
    read_results,
    write_heldout,
    write_results,
)
from dpace.metrics import Acceptance
from dpace.recipes.validation import from_json, to_json
from dpace.servers.apis import Counts
from tests.support.rows import make_bench, make_plain, make_response, make_row

WHERE = {"set": "s", "temperature": 0.0}
BENCH = make_bench(
    make_row(examples=[Example(id="0", what="fastest", tau=2.0, speedup=2.0, pieces=[("a", False), ("b", True)])]),
    make_row(width=2, tau=None, tau_interval=(None, None), slot_acceptance_rate=[0.5, None]),
    comparisons=[
        Comparison(
            **WHERE, width="full", drafter="b", baseline="a", tau_gain=(None,) * 3, speed_ratio=(1.0, None, None)
        )
    ],
)
DEMO = make_bench(
    llamacpp=[
        LlamacppRow(
            set="s", plain_tokens_per_second=1.0, tokens_per_second=2.0, num_same_text=1, num_responses=1, threads=2
        )
    ]
)
COMPARED = ComparedRow(
    **WHERE,
    drafter="dpace",
    num_prompts=1,
    block_size=3,
    histogram=[1, 0, 1],
    tau=2.0,
    tau_interval=(1.5, 2.5),
    tau_by_seed=[2.0],
    reach_rate=[0.5, 0.5],
    gain=(0.1, 0.0, 0.2),
    gain_by_seed=[0.1],
    step_seconds=0.5,
    peak_memory_bytes=None,
)
COMPARE = CompareResults(target="t", baseline="dflash", seeds=[0], reduction="mean", rows=[COMPARED], decode=BENCH)
SERVED = ServerRow(
    **WHERE,
    concurrency=1,
    tokens_per_second=1.0,
    throughput=1.0,
    first_seconds=(0.1, 0.2),
    num_responses=1,
    tau=None,
    tau_interval=(None, None),
    num_verifications=None,
    histogram=None,
    reach_rate=None,
    decode_speedup=None,
    decode_speedup_interval=(None, None),
    num_same_text=None,
)
ADDRESSES = {"drafter": ServerAddress(url="http://x", engine="vllm")}
SERVERS = ServerResults(target="t", servers=ADDRESSES, max_new_tokens=9, seed=0, rows=[SERVED])
ALL = {"bench": BENCH, "demo": DEMO, "compare": COMPARE, "servers": SERVERS}
HELDOUT = Heldout(ids=["a", "b"], block_size=2, histogram=[[1, 2], [3, 4]], num_without_bonus=[0, 1])


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_read(name, tmp_path):
    write_results(tmp_path / "results.json", ALL[name])
    found = read_results(tmp_path / "results.json")
    assert type(found) is type(ALL[name]) and found == ALL[name]
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_the_keys_of_the_file_are_kept():
    """Scripts read them; a key of another name is another schema version."""
    bench = to_json(BENCH)
    top = "target drafters max_new_tokens seed engine dtype hardware versions schema_version rows comparisons"
    assert " ".join(bench) == top and bench["schema_version"] == 1
    row = "drafter width set temperature num_responses block_size histogram num_without_bonus tau tau_interval"
    row += " acceptance_rate reach_rate slot_acceptance_rate share_copied tokens_per_second plain_tokens_per_second"
    row += " decode_speedup decode_speedup_interval published num_same_text responses plain_responses examples"
    assert " ".join(bench["rows"][0]) == row
    response = (
        "drafter width set id turn temperature prompt_tokens token_ids accepted_lengths widths num_copied histogram"
    )
    response += " num_without_bonus decode_tokens decode_seconds prefill_seconds same_text"
    assert " ".join(bench["rows"][0]["responses"][0]) == response
    assert bench["rows"][1]["tau"] is None and bench["rows"][1]["width"] == 2
    assert "llamacpp" not in bench and len(to_json(DEMO)["llamacpp"]) == 1
    assert " ".join(to_json(COMPARE)) == "schema_version target baseline seeds reduction rows decode"
    assert not any(key.startswith("plain_") for key in to_json(SERVED))  # without a plain server
    assert " ".join(to_json(HELDOUT)) == "ids block_size histogram num_without_bonus"


def test_every_dataclass_of_the_files_is_kept_as_it_is():
    """No field is renamed, left out, or of a type that JSON does not give back."""
    group = GroupRecord(
        **WHERE,
        ids=["a"],
        concurrency=1,
        turns=[
            {
                "drafter": SideRecord(
                    token_ids=[[1, 2]],
                    decode_tokens=[1],
                    decode_seconds=[0.5],
                    first_seconds=[0.5],
                    seconds=1.0,
                    counts=Counts(2, 1, None),
                )
            }
        ],
    )
    for value in (*ALL.values(), HELDOUT, group):
        assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


def parts(value, path=()):
    """Every place in a JSON value: where it is."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from parts(item, (*path, key))


OTHERS = st.sampled_from([None, True, -1, 10**400, 0.5, "", "full", "\n", [], [1], [[]], {}, {"a": 1}, 1e308])


@pytest.mark.parametrize("name", [*ALL, "heldout"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_file_is_read_or_refused_in_one_line(name, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    path, read = folder / "results.json", lambda: read_results(folder / "results.json")
    if name == "heldout":
        path, read = folder / "heldout.json", lambda: read_heldout(folder)
    value = copy.deepcopy(to_json(ALL.get(name, HELDOUT)))
    where = data.draw(st.sampled_from([place for place in parts(value) if place]))
    holder = value
    for key in where[:-1]:
        holder = holder[key]
    change = data.draw(st.sampled_from(["drop", "replace", "add", "truncate", "bytes"]))
    if change == "drop":
        del holder[where[-1]]
    elif change == "replace":
        holder[where[-1]] = data.draw(OTHERS)
    elif change == "add" and isinstance(holder, dict):
        holder[data.draw(st.text(max_size=5))] = 1
    content = json.dumps(value).encode()
    if change == "truncate":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    if change == "bytes":
        at = data.draw(st.integers(0, len(content)))
        content = content[:at] + data.draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
    path.write_bytes(content)
    try:
        found = read()
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 1500
    else:
        assert is_dataclass(found) and change != "truncate"
        write_results(path, found) if name != "heldout" else write_heldout(folder, found)
        assert read() == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[]", "found list, expected an object"),
        ("{}", "no schema_version, expected 1"),
        ('{"schema_version": 2}', "schema_version 2, expected 1"),
        ('{"schema_version": true}', "schema_version True, expected 1"),
        ('{"schema_version": "1"}', "schema_version '1', expected 1"),
        ('{"schema_version": 1}', "is missing, expected"),
        ('{"schema_version": 1, "rows": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "not JSON"),
        ('{"schema_version": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_broken_files_are_told(content, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        find_results(tmp_path)
    text = str(caught.value)
    assert (
        text.startswith(f"{path}: ") and message in text and text.endswith("measure again with this version of dpace")
    )
    assert "\n" not in text


def test_a_wrong_key_is_named(tmp_path):
    value = to_json(COMPARE)
    value["decode"]["rows"][1]["responses"][0]["width"] = "wide"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value))
    place = r"decode\.rows\[1\]\.responses\[0\]\.width is 'wide', expected one of auto, full or an integer"
    with pytest.raises(ValueError, match=place):
        read_results(path)
    value = to_json(COMPARE)
    value["decode"]["schema_version"] = 2
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"decode\.schema_version is 2"):
        read_results(path)
    value = to_json(BENCH)
    value["rows"][0]["new"] = value["rows"][0].pop("tau")
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"there is no key 'rows\[0\].new' \(there are drafter, "):
        read_results(path)


def test_predictions_of_older_versions_are_left_out(tmp_path):
    value = to_json(COMPARE)
    value["decode"]["predictions"] = [{"drafter": "dpace", "widths": [2, 3]}]
    (tmp_path / "results.json").write_text(json.dumps(value))
    assert read_results(tmp_path / "results.json") == COMPARE


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(ValueError, match="has no results.json or servers.json"):
        find_results(tmp_path)
    write_results(tmp_path / "results.json", BENCH)
    write_results(tmp_path / "servers.json", SERVERS)
    assert [type(found) for found in find_results(tmp_path)] == [BenchResults, ServerResults]


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, BENCH)

    def fail(file):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_results(path, DEMO)
    assert read_results(path) == BENCH


def test_heldout_rows_are_chosen_by_prompt(tmp_path):
    acceptance = Acceptance([[1, 2], [3, 4]], 2, [0, 1])
    write_heldout(tmp_path, Heldout.of(["a", "b"], acceptance))
    found = read_heldout(tmp_path)
    assert found == HELDOUT
    chosen = found.acceptance(["b", "other"])
    assert chosen.rows.tolist() == [[3, 4]] and chosen.without_bonus.tolist() == [1]
    assert found.acceptance(["other"]) is None
    (tmp_path / "heldout.json").write_text(json.dumps({**to_json(HELDOUT), "block_size": 3}))
    with pytest.raises(ValueError, match=r"heldout.json: .* 3 counts each; remove the file"):
        read_heldout(tmp_path)


def test_a_log_may_hold_nan_but_has_to_be_a_log(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text('{"log_history": [{"loss": NaN}]}')
    assert len(read_log(tmp_path)) == 1
    for content in ("[", "{}", '{"log_history": [1]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"trainer_state.json: .*; train again"):
            read_log(tmp_path)


def test_each_response_has_one_speedup():
    ours, plain = make_response(decode_tokens=6, decode_seconds=2.0), make_plain(decode_tokens=4, decode_seconds=2.0)
    assert ours.speedup_over(plain) == pytest.approx(1.5)
    assert ours.speedup_over(make_plain(decode_tokens=0)) is None
    assert {entry.name for entry in fields(ours)} == set(to_json(ours))
