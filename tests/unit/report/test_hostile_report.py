"""Hostile results, logs, names and places for `dpace report`: one clear line, or a right page."""

import json

import pytest

from dpace.cli import main
from dpace.measure.results import write_results
from tests.support.files import change_json
from tests.support.rows import make_bench, make_plain, make_response, make_row
from tests.unit.engines.test_hostile_engines import ESC, refused, tree

NAME = f"{ESC}a|b`c`<script>alert(1)</script>\n# d [bold]e[/bold] $x$ \\"


RESULTS = {"infinity": {"seed": 1e999}, "no rows": {"rows": []}}


@pytest.mark.parametrize("fault", RESULTS)
def test_report_refuses_results_that_are_none(fault, tmp_path, capsys):
    write_results(tmp_path / "results.json", make_bench())
    change_json(tmp_path / "results.json", **RESULTS[fault])
    refused(["report", str(tmp_path)], capsys, "results.json", "measure again")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("log", [[{"step": "x"}], "x"], ids=str)
def test_report_refuses_logs_that_are_none(log, tmp_path, capsys):
    write_results(tmp_path / "results.json", make_bench())
    (tmp_path / "dpace").mkdir()
    (tmp_path / "dpace" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    refused(["report", str(tmp_path)], capsys, "trainer_state.json")


def test_names_are_shown_as_they_are(tmp_path, capsys):
    """In the page, in the Markdown and in the terminal's tables."""
    from dpace.report.sections import tables_of
    from dpace.report.tables import Section, console, section_table, to_markdown

    named = [make_row(set=NAME, drafter=NAME, responses=[make_response(set=NAME)], plain_responses=[make_plain()])]
    results = make_bench(*named, drafters={NAME: "0" * 64}, target=f"t/{NAME}")
    write_results(tmp_path / "results.json", results)
    assert main(["report", str(tmp_path)]) == 0
    markdown = "\n\n".join(map(to_markdown, tables_of(results)))
    for text in ((tmp_path / "report.html").read_text(), markdown):
        assert "<script" not in text and "\x1b" not in text
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all("\n# d" not in line for line in lines) and "\\|b" in markdown and "\n# d" not in markdown
    capsys.readouterr()
    words = Section(NAME, NAME, [{NAME: NAME, "check": NAME}], num_texts=2, note=NAME)
    console().print(*map(section_table, [*tables_of(results), words]))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[bold]e[/bold]" in out


def test_report_leaves_pages_of_others(tmp_path, capsys):
    write_results(tmp_path / "results.json", make_bench())
    page = tmp_path / "report.html"
    page.write_text("mine")
    refused(["report", str(tmp_path)], capsys, page.name, "was not written by dpace")
    assert page.read_text() == "mine"
    page.unlink()
    assert main(["report", str(tmp_path)]) == 0 and main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("output", ["report.md", ".", "a\x00b.html", "results.json/x.html"])
def test_report_refuses_places_that_are_none(output, tmp_path, capsys):
    write_results(tmp_path / "results.json", make_bench())
    before = tree(tmp_path)
    refused(["report", str(tmp_path), "--output", f"{tmp_path}/{output}"], capsys)
    assert tree(tmp_path) == before
