import json
import re
import shutil
import subprocess

import pytest

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.data.prompts import Prompt
from dpace.measure.benchmark import bench
from dpace.report.page import read_folder, write_report
from dpace.report.tables import copied_note

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def folder(language_target, language_drafter, language_prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    prompts = [
        Prompt(f"<{i}>", f"set{i % 2}", [[{"role": "user", "content": text}]])
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
        titles[0],
        "Speed",
        "Acceptance by slot",
        "Accepted lengths",
        "Speed against verify width",
        "Prompt by prompt",
        "Best and slowest responses",
        "Provenance",
    ]
    assert text.count("<svg") == text.count("</svg>") == 4 and "<mark>" in text and "viewport" in text
    assert "&lt;" in text and "<0>" not in text  # what prompts hold is text
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|rdf:resource="[^"]*"', "", text)
    assert not re.search(r'(src|href)="(?!data:|#)', without_names) and "url(http" not in without_names
    assert markdown.read_text().count("## ") == len(titles)


def test_examples_are_the_responses(folder, language_target):
    import json

    results = json.loads((folder / "results.json").read_text())
    by_id = {r["id"]: r for row in results["rows"] for r in row["responses"] if row["temperature"] == 0}
    row = results["rows"][0]
    assert [example["what"] for example in row["examples"]] == ["fastest", "slowest"]
    for example in row["examples"]:
        response = by_id[example["id"]]
        text = language_target.tokenizer.decode(response["token_ids"], skip_special_tokens=True)
        assert "".join(piece for piece, _ in example["pieces"]) == text
    assert any(is_draft for example in row["examples"] for _, is_draft in example["pieces"])


def test_it_says_how_much_was_copied(folder, tmp_path):
    """With width auto, by set and temperature; and nothing where nothing was."""
    results = json.loads((folder / "results.json").read_text())
    rows = [{**row, "share_copied": 0.25 if row["width"] == "auto" else 0.0} for row in results["rows"]]
    assert "set1 25% at T=0," in copied_note(rows, start="; ")
    assert not copied_note([row for row in rows if row["width"] == "full"], start="; ")
    (tmp_path / "results.json").write_text(json.dumps({**results, "rows": rows}))
    page, _ = write_report([tmp_path], tmp_path / "report.html")
    assert "prompt lookup): set0 25% at T=0" in page.read_text()
    assert all("num_copied" in response for row in results["rows"] for response in row["responses"])


def test_the_verb(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 0
    assert "r.md" in capsys.readouterr().out and (tmp_path / "r.html").exists()
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "results.json" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_it_without_errors(folder, tmp_path):
    page, _ = write_report([folder], tmp_path / "report.html")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [CHROMIUM, *flags.split(), "--disable-component-update", f"--user-data-dir={tmp_path}/profile"]
    command += [
        "--enable-logging=stderr",
        "--window-size=390,3000",
        f"--screenshot={tmp_path}/page.png",
        f"file://{page}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_folder_of_compare_and_logs_are_read(folder, tmp_path):
    import json

    results = json.loads((folder / "results.json").read_text())
    row = {"set": "a", "drafter": "dpace", "tau": 2.0, "tau_interval": [1.9, 2.1], "gain": [0.1, 0.0, 0.2]}
    row["gain_by_seed"] = [0.1, 0.12]
    compared = {"target": "t", "baseline": "dflash", "seeds": [0, 1], "reduction": "anchors", "decode": results}
    (tmp_path / "results.json").write_text(json.dumps({**compared, "rows": [row, {**row, "drafter": "dflash"}]}))
    log = [
        {"step": 10, "step_seconds": 1.0, "weight_share/1": 0.6, "weight_share/2": 0.4},
        {"step": 10, "eval_tau": 1.5},
    ]
    (tmp_path / "dpace" / "seed-0").mkdir(parents=True)
    (tmp_path / "dpace" / "seed-0" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    titles = [section.title for section in read_folder(tmp_path)]
    assert titles[0] == "Objectives, t" and {"Speed", "Training", "Weights over training"} <= set(titles)
