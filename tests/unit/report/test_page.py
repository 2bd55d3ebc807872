"""The page has what the terminal shows, and drawings; hostile results, logs, names and places give one clear line."""

import html
import json
import re
from dataclasses import asdict, replace

import pytest

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.measure.benchmark import bench
from dpace.measure.results import find_results, read_results, write_results
from dpace.metrics import MIN_PROMPTS
from dpace.report.page import sections_of, write_report
from dpace.report.plots import DRAWINGS
from dpace.report.sections import speeds, tables_of
from dpace.report.tables import Section, console, section_table, to_markdown
from dpace.respond.responses import Response
from tests.support.files import change_json, make_prompts, write_rows
from tests.support.rows import make_bench, make_compare, make_compared, make_plain, make_response, make_row
from tests.unit.engines.test_hostile_engines import ESC, refused, tree

NAME = f"{ESC}a|b`c`<script>alert(1)</script>\n# d [bold]e[/bold] $x$ \\"


@pytest.fixture
def folder(tmp_path):
    responses = [make_response(id=str(number)) for number in range(MIN_PROMPTS)]
    plain = [make_plain(id=response.id) for response in responses]
    rows = [make_row(set=f"<{number}>", responses=responses, plain_responses=plain) for number in range(2)]
    write_results(tmp_path / "results.json", make_bench(*rows, thinking=False))
    return tmp_path


def write_log(folder):
    log = []
    for step in (10, 20):
        log.append({"step": step, "loss": 1.0, "weight_share/1": 1.0})
        log.append({"step": step, "eval_tau": 1.5})
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))


def test_the_page_has_every_section(folder, run_line):
    write_log(folder / "drafter")
    page = folder / "out" / "report.html"
    assert str(page) in run_line(f"report {folder} --output {page}").out
    text = page.read_text()
    title, heading, speed, *others = re.findall(r"<h[123]>(.*?)</h[123]>", text)
    assert title.startswith("Drafters for ") and heading == str(folder) and speed.startswith("Speed: ")
    reach = "Reach rate in %: slots 1 to k of a whole draft all accepted"
    assert others == [reach, *(title for title, *_ in DRAWINGS), "Provenance"]
    assert re.search(r"Written on 20\d\d-\d\d-\d\d by <code>dpace report", text)
    (results,) = find_results(folder)
    for section in tables_of(results):
        for row in section.rows:
            cells = (f">{html.escape(cell)}</td>" for cell in row.values())
            assert re.search("<tr>" + "".join(f"<td[^>]*{re.escape(cell)}" for cell in cells), text)
    for fact in ("thinking</td><td>false", "a processor", "0" * 64, "tau, validation<"):
        assert fact in text
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|rdf:resource="[^"]*"', "", text)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(http|<script', without_names), "it needs no network"
    assert text.count("<svg") == len(DRAWINGS) and len(re.findall(r'<g id="([^"]*)"', text)) > 10


def test_the_page_shows_what_is_scored(folder, run_line):
    """The last answers, as many as there are spans; hostile messages are shown as they are."""
    said = [("user", NAME), ("assistant", "example"), ("user", "why?"), ("assistant", "so " * 200)]
    messages = [{"role": role, "content": text} for role, text in said]
    rows = [asdict(Response(NAME, "s", messages, [1, 2, 3], [[1, 3]])), asdict(Response("b", "s", [{}], [1], []))]
    write_rows(folder / "responses.jsonl", rows)
    run_line(f"report {folder}")
    text = (folder / "report.html").read_text()
    rows = re.findall(r"<td>(user|assistant|None)</td><td>(.*?)</td><td>(.*?)</td>", text)
    assert [(role, scored) for role, scored, _ in rows] == [
        ("user", ""),
        ("assistant", ""),
        ("user", ""),
        ("assistant", "yes"),
        ("None", ""),
    ]
    assert rows[3][2].endswith("so so...") and "<script" not in text


def test_a_folder_of_compare_and_logs_are_read(tmp_path):
    row = make_compared(set="a", tau_by_seed=[2.0, 2.0])
    compared = make_compare(
        row, replace(row, drafter="dflash", tau=(None,) * 3, histogram=[0, 0, 0]), seeds=[0, 1], decode=make_bench()
    )
    write_results(tmp_path / "results.json", compared)
    for name in ("dpace/seed-0", "drafter"):
        write_log(tmp_path / name)
    sections = {section.title: section for section in sections_of(read_results(tmp_path / "results.json"), tmp_path)}
    assert next(iter(sections)) == "Objectives: t, reduction mean, seeds 0, 1"
    assert [title.partition(" ")[0] for title in sections][1:3] == ["Speed:", "Reach"]
    for title, words in {
        "Training": ("tau, validation", "optimizer step"),
        "Weights over training": ("step 10<", "stroke-dasharray", " dpace<", " drafter<"),
    }.items():
        assert all(word in sections[title].drawing for word in words)


def test_responses_of_a_single_token_have_no_numbers_and_are_shown(
    language_target, language_drafter, language_prompts, tmp_path
):
    """No verification, no speed: `-` and null, never NaN, and no warning."""
    config = BenchConfig(max_new_tokens=1, temperatures=(0.0,))
    drafters = {"a": language_drafter, "b": language_drafter}
    bench(language_target, drafters, make_prompts(language_prompts[:7]), config, tmp_path)
    results = read_results(tmp_path / "results.json")
    row = results.rows[0]
    assert row.tau == row.decode_speedup == (None, None, None)
    assert results.rows[1].tau_gain == (None, None, None)
    first = speeds(results).rows[0]
    assert first["decode_speedup [95 %]"] == first["tau [95 %]"] == "-" and "NaN" not in str(speeds(results))
    write_report([tmp_path], tmp_path / "report.html")


def test_names_are_shown_as_they_are(run_line, tmp_path, capsys):
    """In the page, in the Markdown and in the terminal's tables."""
    results = make_bench(make_row(set=NAME, drafter=NAME), drafters={NAME: "0" * 64}, target=f"t/{NAME}")
    write_results(tmp_path / "results.json", results)
    run_line(f"report {tmp_path}")
    markdown = "\n\n".join(map(to_markdown, tables_of(results)))
    for text in ((tmp_path / "report.html").read_text(), markdown):
        assert "<script" not in text and "\x1b" not in text
    assert "\\|b" in markdown and "\n# d" not in markdown
    words = Section(NAME, NAME, [{NAME: NAME, "check": NAME}], num_texts=2, note=NAME)
    console().print(*map(section_table, [*tables_of(results), words]))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[bold]e[/bold]" in out


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("results.json", {"seed": 1e999}),
        ("results.json", {"rows": []}),
        ("dpace/trainer_state.json", {"log_history": [{"step": "x"}]}),
        ("dpace/trainer_state.json", {"log_history": "x"}),
        ("dpace/trainer_state.json", {"log_history": [{"eval_tau": 1.5}]}),
    ],
    ids=str,
)
def test_files_that_are_none_are_refused(file, change, folder, capsys):
    (folder / "dpace").mkdir()
    (folder / "dpace" / "trainer_state.json").write_text('{"log_history": []}')
    change_json(folder / file, **change)
    refused(f"report {folder}", capsys, file, "again")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("output", ["report.md", ".", "results.json/x.html", "mine.html"])
def test_places_that_are_none_are_refused(output, folder, capsys):
    (folder / "mine.html").write_text("mine")
    before = tree(folder)
    refused(f"report {folder} --output {folder}/{output}", capsys)
    refused(f"report {folder}/nothing", capsys, "has no results.json")
    assert tree(folder) == before
    assert main(["report", str(folder)]) == main(["report", str(folder)]) == 0, "its own page is written again"
