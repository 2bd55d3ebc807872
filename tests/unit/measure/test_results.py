"""results.json, servers.json and heldout.json are read as they were written, or refused in one line."""

import json

import pytest

from dpace.measure.results import (
    Comparison,
    Heldout,
    find_results,
    read_heldout,
    read_log,
    read_results,
    write_heldout,
    write_results,
)
from dpace.metrics import Acceptance
from dpace.recipes.validation import to_json
from tests.support.rows import (
    make_bench,
    make_compare,
    make_compared,
    make_row,
    make_served,
    make_servers,
)

WHERE = {"set": "s", "temperature": 0.0}
BENCH = make_bench(
    make_row(),
    make_row(width=2, tau=None, histogram=[0, 0, 0], tau_interval=(None, None)),
    comparisons=[
        Comparison(
            **WHERE, width="full", drafter="b", baseline="a", tau_gain=(None,) * 3, speed_ratio=(1.0, None, None)
        )
    ],
)
COMPARE = make_compare(make_compared(), decode=BENCH)
SERVERS = make_servers(make_served())
ALL = {"bench": BENCH, "compare": COMPARE, "servers": SERVERS}
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
    top = "target max_new_tokens seed drafters engine dtype hardware versions schema_version rows comparisons"
    assert " ".join(bench) == top and bench["schema_version"] == 1
    row = "drafter width set temperature num_responses block_size histogram num_without_bonus tau tau_interval"
    row += " reach_rate share_copied tokens_per_second plain_tokens_per_second"
    row += " decode_speedup decode_speedup_interval published num_same_text responses plain_responses"
    assert " ".join(bench["rows"][0]) == row
    response = (
        "drafter width set id turn temperature prompt_tokens token_ids accepted_lengths widths num_copied histogram"
    )
    response += " num_without_bonus decode_tokens decode_seconds prefill_seconds same_text"
    assert " ".join(bench["rows"][0]["responses"][0]) == response
    assert bench["rows"][1]["tau"] is None and bench["rows"][1]["width"] == 2
    assert " ".join(to_json(COMPARE)) == "schema_version target baseline seeds reduction rows decode"
    served = to_json(SERVERS)
    assert served["schema_version"] == 2 and " ".join(served["rows"][0]) == (
        "set temperature num_responses tau tau_interval num_verifications histogram tau_here tau_over_here "
        "tokens_per_second plain_tokens_per_second num_same_text control_same_text same_text_gain"
    )
    assert " ".join(to_json(HELDOUT)) == "ids block_size histogram num_without_bonus"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[]", "holds list, expected an object"),
        ("{}", "schema_version is 'missing', expected 1"),
        ('{"schema_version": 2}', "schema_version is 2, expected 1"),
        ('{"schema_version": true}', "expected"),
        ('{"schema_version": 1, "servers": {}}', "schema_version is 1, expected 2"),
        ('{"schema_version": 1, "rows": NaN}', "rows is nan, expected a list"),
    ],
)
def test_broken_files_are_told(content, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        find_results(tmp_path)
    text = str(caught.value)
    assert text.startswith(str(path)) and text.endswith("measure again with this version of dpace")
    assert message in text and "\n" not in text


def test_a_wrong_key_is_named(tmp_path):
    value = to_json(COMPARE)
    value["decode"]["rows"][1]["responses"][0]["width"] = "wide"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value))
    place = r"decode\.rows\[1\]\.responses\[0\]\.width is 'wide', expected one of auto, full, copies or an integer"
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


def test_heldout_rows_are_chosen_by_prompt(tmp_path):
    acceptance = Acceptance([[1, 2], [3, 4]], 2, [0, 1])
    write_heldout(tmp_path, ["a", "b"], acceptance)
    found = read_heldout(tmp_path)
    assert found == HELDOUT
    chosen = found.acceptance(["b", "other"])
    assert chosen.rows.tolist() == [[3, 4]] and chosen.without_bonus.tolist() == [1]
    assert found.acceptance(["b", "a"]).rows.tolist() == [[3, 4], [1, 2]], "as asked, whatever the order in the file"
    assert found.acceptance(["other"]) is None
    (tmp_path / "heldout.json").write_text(json.dumps({**to_json(HELDOUT), "block_size": 3}))
    with pytest.raises(ValueError, match=r"heldout.json: histogram\[0\] has 2 entries, expected 3; remove the file"):
        read_heldout(tmp_path)


def test_a_log_may_hold_nan(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": NaN}]}')
    assert len(read_log(tmp_path)) == 1
