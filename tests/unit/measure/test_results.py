"""results.json, servers.json and heldout.json are read as they were written, or refused in one line.

And what others read of them: speculation_profile.json.
"""

import json
import re
from dataclasses import replace

import pytest

from dpace.measure.results import (
    Row,
    find_results,
    read_heldout,
    read_log,
    read_results,
    write_heldout,
    write_profile,
    write_results,
)
from dpace.metrics import Acceptance
from dpace.system.validation import to_json
from tests.support.files import changed_json, read_json
from tests.support.models import make_drafter, make_target
from tests.support.rows import make_bench, make_compare, make_compared, make_row, make_served, make_servers

BENCH = make_bench(
    make_row(),
    make_row(width=2, tau=(None,) * 3, histogram=[0, 0, 0]),
)
COMPARE = make_compare(make_compared(), decode=BENCH)
SERVERS = make_servers(make_served())


@pytest.mark.parametrize("results", [BENCH, COMPARE, SERVERS])
def test_what_is_written_is_read(results, tmp_path):
    write_results(tmp_path / "results.json", results)
    assert find_results(tmp_path) == [results] and [path.name for path in tmp_path.iterdir()] == ["results.json"]


KEYS = {
    "target max_new_tokens seed tokenizer_sha256 chat_template_sha256 thinking drafters drafter_configs "
    "target_weights_sha256 widths engine dtype hardware versions schema_version rows": BENCH,
    "drafter verify_rule width set temperature num_responses block_size histogram tau reach_rate "
    "tau_gain speed_ratio share_copied tokens_per_second plain_tokens_per_second decode_speedup "
    "num_same_text responses plain_responses": BENCH.rows[0],
    "drafter width id turn prompt_tokens token_ids block_size accepted_lengths emitted_lengths widths "
    "num_copied decode_seconds prefill_seconds same_text": BENCH.rows[0].responses[0],
    "schema_version target baseline seeds reduction rows decode": COMPARE,
    "set drafter temperature num_prompts block_size histogram tau tau_by_seed reach_rate gain": COMPARE.rows[0],
    "set temperature depth num_responses tau num_verifications num_drafted tau_here tau_over_here tokens_per_second "
    "plain_tokens_per_second decode_speedup num_same_text control_same_text": SERVERS.rows[0],
}


def test_the_keys_of_the_files_are_kept():
    """Scripts read them; a key of another name is another schema version."""
    for keys, value in KEYS.items():
        assert sorted(to_json(value)) == sorted(keys.split())
    assert [results.schema_version for results in (BENCH, COMPARE, SERVERS)] == [2, 2, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", "holds list, expected dict"),
        ('{"schema_version": 1}', "schema_version is 1, expected 2"),
        ('{"schema_version": 2, "servers": {}}', "schema_version is 2, expected 4"),
    ],
)
def test_broken_files_are_told(content, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}.*{message}.*; measure again with [^\n]*$"):
        find_results(tmp_path)


def test_what_is_wrong_is_named(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, COMPARE)
    with changed_json(path) as value:
        value["decode"]["rows"][1]["responses"][0]["width"] = "wide"
    with pytest.raises(ValueError, match=r"decode\.rows\[1\]\.responses\[0\]\.width is 'wide', expected "):
        read_results(path)


def test_heldout_rows_are_chosen_by_prompt(tmp_path):
    write_heldout(tmp_path, ["a", "b"], Acceptance([[1, 2], [3, 4]], 2, [0, 1]), "hash")
    found = read_heldout(tmp_path)
    chosen = found.acceptance(["b", "other"])
    assert chosen.rows.tolist() == [[3, 4]] and chosen.without_bonus.tolist() == [1]
    assert found.acceptance(["b", "a"]).rows.tolist() == [[3, 4], [1, 2]], "as asked, whatever the order in the file"
    assert found.acceptance(["other"]) is None
    with changed_json(tmp_path / "heldout.json") as value:
        assert sorted(value) == ["block_size", "histogram", "ids", "num_without_bonus", "responses_sha256"]
        del value["ids"]
    with pytest.raises(ValueError, match=r"heldout.json: ids is missing; remove the file"):
        read_heldout(tmp_path)


def drafted(*histogram: int, **options) -> Row:
    """A row of three draft tokens."""
    rates = Acceptance(histogram, 4).reach_rate.tolist()
    return make_row(block_size=4, histogram=list(histogram), reach_rate=rates, **options)


ISSUED = drafted(40, 30, 30, 0)
"""Of 100 verifications 40 accepted no draft token, 30 one, and 30 two."""
UNMEASURED = ([0.0] * 3, [0.0] * 3, None, None)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([drafted(9, 0, 0, 0, width="auto"), ISSUED, drafted(9, 0, 0, 0, temperature=1.0)], None),
        ([ISSUED, drafted(9, 0, 0, 0, drafter="b"), make_row()], None),
        (
            [ISSUED, drafted(0, 0, 0, 100, set="a")],
            ([0.8, 0.65, 0.5], [0.8, 0.65 / 0.8, 0.5 / 0.65], 2.95, {"s": 1.9, "a": 4.0}),
        ),
        ([drafted(9, 0, 0, 0, width=2), drafted(0, 0, 0, 0)], UNMEASURED),
        ([], UNMEASURED),
    ],
)
def test_deployment_tools_read_how_drafts_are_accepted(rows, expected, tmp_path):
    """By NVIDIA's schema 1.0 and with its example: the first drafter's whole drafts, in both counts; or no numbers."""
    spec = replace(make_drafter(make_target("qwen3")).spec, block_size=4)
    write_profile(tmp_path, spec, rows, 'OWNER/"NAME"')
    profile = read_json(tmp_path / "speculation_profile.json")
    marginal, conditional, mean, by_set = expected or ([0.6, 0.3, 0.0], [0.6, 0.5, 0.0], 1.9, {"s": 1.9})
    assert (profile["schema_version"], profile["method"], profile["num_speculative_tokens"]) == ("1.0", "dflash", 3)
    assert profile["target_model"] == {"path": 'OWNER/"NAME"'}
    assert profile["marginal_accept_rates"] == pytest.approx(marginal)
    assert profile["conditional_accept_rates"] == pytest.approx(conditional)
    assert (profile["mean_accept_length"], profile["per_category"]) == (pytest.approx(mean), by_set)
    assert profile["measured"] is (mean is not None)
    if mean:
        assert profile["validation"]["mean_consistency"]["passed"] is True
        assert sum(profile["acceptance_length_histogram"].values()) == 100 * len(by_set)


def test_a_log_may_hold_nan(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": float("nan")}]}))
    assert len(read_log(tmp_path)) == 1
