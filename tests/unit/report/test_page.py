import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.measure.benchmark import bench
from dpace.measure.results import find_results, read_results, write_results
from dpace.prompts.prompts import Prompt
from dpace.report.cells import copied_note
from dpace.report.page import sections_of, write_report
from tests.support.files import make_prompts
from tests.support.rows import make_compare, make_compared

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def folder(language_target, language_drafter, language_prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    prompts = [
        Prompt(str(i), f"<{i % 2}>", [[{"role": "user", "content": text}]])
        for i, text in enumerate(language_prompts[50:56])
    ]
    config = BenchConfig(max_new_tokens=16, temperatures=(0.0, 1.0))
    bench(language_target, {"dpace": language_drafter}, prompts, config, folder)
    return folder


def test_the_page_has_every_section(folder, tmp_path):
    page, markdown = write_report([folder], tmp_path / "out" / "report.html")
    text = page.read_text()
    titles = re.findall(r"<h[12]>(.*?)</h[12]>", text)
    assert titles == [
        *titles[:3],
        "Acceptance by slot",
        "Provenance",
    ]
    assert titles[2].startswith("Speed: ") and "viewport" in text
    assert text.count("<svg") == text.count("</svg>") == 2
    assert len(set(re.findall('<svg[^>]* width="([^"]*)"', text))) == 1 and "prefers-color-scheme: dark" in text
    assert "#5eed" not in text and re.search(r"Written on 20\d\d-\d\d-\d\d by <code>dpace report", text)
    assert "&lt;" in text and "<0>" not in text  # what prompts hold is text
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|rdf:resource="[^"]*"', "", text)
    assert not re.search(r'(src|href)="(?!data:|#)', without_names) and "url(http" not in without_names
    assert len(re.findall("^#+ ", markdown.read_text(), re.MULTILINE)) == len(titles)


def test_it_says_how_much_was_copied(folder, tmp_path):
    """With width auto, by set and temperature; and nothing where nothing was."""
    results = read_results(folder / "results.json")
    rows = [replace(row, share_copied=0.25 if row.width == "auto" else 0.0) for row in results.rows]
    assert "<1> 25% at T=0," in copied_note(rows)
    assert "<1>, other, 25% at T=0" in copied_note([*rows, *(replace(row, drafter="other") for row in rows)])
    assert not copied_note([row for row in rows if row.width == "full"])
    write_results(tmp_path / "results.json", replace(results, rows=rows))
    page, _ = write_report([tmp_path], tmp_path / "report.html")
    assert "prompt lookup): &lt;0&gt; 25% at T=0" in page.read_text()


def test_the_verb(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 0
    assert "r.md" in capsys.readouterr().out and (tmp_path / "r.html").exists()
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "results.json" in capsys.readouterr().err
    (tmp_path / "servers.json").write_text('{"servers": {}, "schema_version": 1}')
    assert main(["report", str(tmp_path)]) == 1
    assert "schema_version is 1, expected 2; measure again" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it_without_errors(width, folder, tmp_path):
    page, _ = write_report([folder], tmp_path / "report.html")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [CHROMIUM, *flags.split(), "--disable-component-update", f"--user-data-dir={tmp_path}/profile"]
    command += [
        "--enable-logging=stderr",
        f"--window-size={width},3000",
        f"--screenshot={tmp_path}/page.png",
        f"file://{page}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000
    at_the_right = imread(tmp_path / "page.png")[:, -110].sum(-1)
    num_edges = (np.abs(np.diff(at_the_right)) > 0.1).sum()
    assert width == 390 or num_edges > 20  # rows of tables reach as far as the window


def test_a_folder_of_compare_and_logs_are_read(folder, tmp_path):
    row = make_compared(set="a", tau_by_seed=[2.0, 2.0], gain_by_seed=[0.1, None], step_seconds=None)
    decoded = read_results(folder / "results.json")
    compared = make_compare(row, replace(row, drafter="dflash", tau=None), seeds=[0, 1], decode=decoded)
    write_results(tmp_path / "results.json", compared)
    log = [
        {"step": 10, "step_seconds": 1.0, "weight_share/1": 0.6, "weight_share/2": 0.4},
        {"step": 10, "eval_tau": 1.5},
    ]
    (tmp_path / "dpace" / "seed-0").mkdir(parents=True)
    (tmp_path / "dpace" / "seed-0" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    titles = [section.title for results in find_results(tmp_path) for section in sections_of(results, tmp_path)]
    assert titles[0] == "Objectives, t, reduction mean, seeds 0, 1"
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
    _, markdown = write_report([tmp_path], tmp_path / "report.html")
    assert "| s | 0 | a | full | - |" in markdown.read_text()
