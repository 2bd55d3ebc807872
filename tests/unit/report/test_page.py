import html
import json
import re
from dataclasses import replace

import pytest

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.measure.benchmark import bench
from dpace.measure.results import find_results, read_results, write_results
from dpace.metrics import MIN_PROMPTS
from dpace.report.page import sections_of, write_report
from dpace.report.sections import speeds, tables_of
from tests.support.files import make_prompts
from tests.support.rows import make_bench, make_compare, make_compared, make_plain, make_response, make_row


@pytest.fixture
def folder(tmp_path):
    responses = [make_response(id=str(number)) for number in range(MIN_PROMPTS)]
    plain = [make_plain(id=response.id) for response in responses]
    rows = [make_row(set=f"<{number}>", responses=responses, plain_responses=plain) for number in range(2)]
    write_results(tmp_path / "results.json", make_bench(*rows, thinking=False))
    return tmp_path


def test_the_page_has_every_section(folder, tmp_path):
    page = tmp_path / "out" / "report.html"
    write_report([folder], page)
    text = page.read_text()
    titles = re.findall(r"<h[123]>(.*?)</h[123]>", text)
    title, speed = titles[0], titles[2]
    assert title.startswith("Drafters for ") and speed.startswith("Speed: ")
    reach = "Reach rate in %: slots 1 to k of a whole draft all accepted"
    assert titles == [title, str(folder), speed, reach, "Acceptance by slot", "Provenance"]
    assert text.count("<svg") == text.count("</svg>") == 1 and "viewport" in text and "prefers-color-scheme" not in text
    assert re.search(r"Written on 20\d\d-\d\d-\d\d by <code>dpace report", text)
    assert "&lt;" in text and "<0>" not in text  # what prompts hold is text
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|rdf:resource="[^"]*"', "", text)
    assert not re.search(r'(src|href)="(?!data:|#)', without_names) and "url(http" not in without_names
    ids = re.findall(r'<g id="([^"]*)"', text)
    assert "<script" not in text and len(ids) > 10


def test_it_has_the_cells_of_the_terminals_tables(folder, tmp_path):
    write_report([folder], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    (results,) = find_results(folder)
    for section in tables_of(results):
        for row in section.rows:
            cells = (f">{html.escape(cell)}</td>" for cell in row.values())
            assert re.search("<tr>" + "".join(f"<td[^>]*{re.escape(cell)}" for cell in cells), text)


def test_thinking_is_named(folder, tmp_path):
    (tmp_path / "on").mkdir()
    write_results(tmp_path / "on" / "results.json", make_bench(thinking=True))
    write_report([folder, tmp_path / "on"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert f"<h2>{folder}</h2>" in text and f"<h2>{tmp_path / 'on'}, with thinking</h2>" in text
    assert re.findall(r">thinking</td><td>(\w+)<", text) == ["off", "on"]


def test_the_verb(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 0
    assert "r.html" in capsys.readouterr().out and (tmp_path / "r.html").exists()
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "results.json" in capsys.readouterr().err
    (tmp_path / "servers.json").write_text('{"servers": {}, "schema_version": 1}')
    assert main(["report", str(tmp_path)]) == 1
    assert "schema_version is 1, expected 2; measure again" in capsys.readouterr().err


def test_a_folder_of_compare_and_logs_are_read(tmp_path):
    row = make_compared(set="a", tau_by_seed=[2.0, 2.0], gain_by_seed=[0.1, None], step_seconds=None)
    compared = make_compare(
        row, replace(row, drafter="dflash", tau=None, histogram=[0, 0, 0]), seeds=[0, 1], decode=make_bench()
    )
    write_results(tmp_path / "results.json", compared)
    log = [
        {"step": 10, "loss": 1.0, "weight_share/1": 0.6, "weight_share/2": 0.4},
        {"step": 10, "eval_tau": 1.5},
    ]
    (tmp_path / "dpace" / "seed-0").mkdir(parents=True)
    (tmp_path / "dpace" / "seed-0" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    titles = [section.title for results in find_results(tmp_path) for section in sections_of(results, tmp_path)]
    assert titles[0] == "Objectives: t, reduction mean, seeds 0, 1"
    assert {"Acceptance by slot", "Training", "Weights over training"} <= set(titles)


def test_responses_of_a_single_token_have_no_numbers_and_are_shown(
    language_target, language_drafter, language_prompts, tmp_path
):
    """No verification, no speed: `-` and null, never NaN, and no warning."""
    config = BenchConfig(max_new_tokens=1, temperatures=(0.0,))
    drafters = {"a": language_drafter, "b": language_drafter}
    results = bench(language_target, drafters, make_prompts(language_prompts[:7]), config, tmp_path)
    row = read_results(tmp_path / "results.json").rows[0]
    assert row.tau is row.decode_speedup is row.published.tau is None and row.tau_interval == (None, None)
    assert results.comparisons[0].tau_gain == (None, None, None)
    assert "NaN" not in (tmp_path / "results.json").read_text()
    first = speeds(results).rows[0]
    assert first["decode_speedup [95 %]"] == first["tau [95 %]"] == "-" and "NaN" not in str(speeds(results))
    write_report([tmp_path], tmp_path / "report.html")
