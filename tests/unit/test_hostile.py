"""Hostile command lines end in one line that names the thing and a way out, before any model is loaded."""

import importlib
import io
import json
import os
import re
import shlex
import sys
from unittest import mock

import pytest

from dpace.cli import main
from dpace.config import Recipe
from dpace.recipes import OF_FOLDERS, OF_RECIPES, VERBS
from dpace.report.tables import console
from dpace.system.progress import print_text
from tests.support.files import write_prompts, write_rows

TARGET = "/no/such/target"
"""What is not refused before ends here, with a line that no case expects."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder_without_models(monkeypatch, tmp_path):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    monkeypatch.setattr("dpace.training.progress.get_available_trackers", list)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    """Run a command line, and compare the one line that it ends with."""

    def run(args: str | list[str], pattern: str, code: int = 1) -> None:
        args = shlex.split(args) if isinstance(args, str) else args
        assert main(args) == code
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith(f"dpace {args[0]}: ") and re.search(pattern, line), line
        assert ";" in line, "there is a way out"
        assert line.isprintable() and len(line) < 1000 and not printed.out

    return run


FLAGS = {
    "train --learning-rat 1": "--learning-rat.*did you mean --train.learning-rate[?]",
    "train --epochs 3": "--epochs.*did you mean --train.num-epochs[?]",
    "train --qqq 3": "--qqq[^?]*$",
    "train extra": "no recipe named 'extra'; name a YAML file, or one of .*qwen3-4b-3l",
    "respond --output": "--output",
    "train --train.batch-size 1.5": "batch-size.*1.5",
    "check --drafter x": "target",
    "respond '\x1b[2J\x07\udc80'": r"\\x1b.*udc80",
}
RANGES = {
    "train --loss.objective dpce": "--loss.objective is 'dpce', expected 'dpace', .* or package.module:function",
    "compare --objectives no_such_module:weigh+kl": (
        "cannot be imported, ModuleNotFoundError: No module named 'no_such_module'; run dpace in"
    ),
    "train --train.report-to wandb": "'wandb', which is unknown or not installed",
    "train --train.batch-size=0": "--train.batch-size is 0, expected greater than or equal to 1",
    "train --train.warmup-ratio=nan": "is nan, expected a finite number",
    "bench --widths=0": "--bench.widths is 0, expected 'auto', 'full' or 'copies' or greater",
    "bench --temperatures 0 0.0": "--bench.temperatures has 0.0 twice",
    "bench --temperatures": r"--bench.temperatures is \(\), expected at least 1 item",
    "train --drafter.target-layer-ids 1 3 --drafter.num-features 3": r"is \(1, 3\), but num_features is 3; leave",
    "respond --target '  '": "--target is '  ', expected a text that is not empty",
    "respond --output '\udcff'": "--output is .*udcff",
}

ADDRESSES = [
    "http://u:secret@h:1",
    r"http:\\u:secret@h",
    "127.0.0.1:9",
    "file:///etc/passwd",
    "ht\ttp://u:secret@h",
    "http://u:sec/secret@h",
    "http://u:secret@h:9/\udcff",
]


ASKED = [("respond --respond.server", address) for address in ADDRESSES]
ASKED += [(option, ADDRESSES[0]) for option in ("train --train.feature-servers", "bench --bench.server")]
"""Each spelling, and each option, whose type is the same."""


@pytest.mark.parametrize(("option", "address"), ASKED)
def test_what_is_no_address_is_refused_and_shows_no_password(option, address, refused, tmp_path):
    verb, flag = option.split()
    refused([verb, flag, address], f"{flag}[^:]* an address http://host:port")
    refused([verb, f"{flag}={address}"], "^((?!secret).)*$")
    group, name = flag.removeprefix("--").replace("-", "_").split(".")
    (tmp_path / "r.yaml").write_text(f"{group}: {{{name}: {json.dumps(address)}}}")
    refused([verb, "r.yaml"], "^((?!secret).)*$")


OBJECTIVES = {
    "": "has no attribute 'weigh'",
    "weigh = 5": "is int, expected a function",
    "def weigh(): pass": "fails on a batch.*TypeError",
    "def weigh(slots): return slots.is_scored.float()[0]": r"gives the shape \(3, 16\), .* a tensor \(2, 3, 16\)",
    "def weigh(slots): return -slots.is_scored.float()": "gives weights that are negative",
}


@pytest.mark.parametrize("body", OBJECTIVES)
def test_objectives_of_ones_own(body, refused, tmp_path):
    name = f"hostile_objective_{list(OBJECTIVES).index(body)}"
    (tmp_path / f"{name}.py").write_text(body)
    refused(["train", "--target", TARGET, "--loss.objective", f"{name}:weigh"], OBJECTIVES[body])


FILES = {
    "train r.yaml": {
        "a: [1": "cannot read the recipe r.yaml: .*line 1",
        "\udcff\udcfe\x00": "UTF-8|utf-8",
        "": "holds null",
        "a: &a [x, x]\nb: *a": "no aliases .*line 2",
        "output: !!python/object/apply:os.system [ls]": "no.* the tag .*python/object",
        f"train: {{seed: {'9' * 5000}}}": "digits",
        "train:\n  seed: 1\n  seed: 2": "'seed' is given twice.*line 3",
        "train:\n  learning_rat: 1": "no key 'train.learning_rat' .did you mean learning_rate",
        "output: {a: 1}": "output is .*expected a valid string",
        "output: 2026-11-29\ntrain: {seed: yes}": "train.seed is True",
        "bench: {widths: [wide]}": "bench.widths.* is 'wide'",
        'output: "\\ud800"': "ud800",
    },
    f"respond --target {TARGET} --prompts.path p.jsonl": {
        '{"prompt": "a"}\n{"prompt": "b': ":2: the line is not JSON",
        "[" * 100_000: ":1: the line is not JSON",
        '{"prompt": "a", "id": {"\x1b[2J": 1}}\n': "p.jsonl:1: ",
        '{"prompt": "a\\ud800"}\n': "surrogates not allowed",
        json.dumps({"prompt": "\u0301\u0323" * 100_000}): "p.jsonl with 1 prompts give no held-out ones",
    },
}
"""What the file holds that the last word names."""


@pytest.mark.parametrize(
    ("line", "text"), [(line, text) for line in FILES for text in FILES[line]], ids=lambda value: ascii(value)[:40]
)
def test_files(line, text, refused, tmp_path):
    (tmp_path / line.split()[-1]).write_bytes(text.encode(errors="surrogateescape"))
    refused(line, FILES[line][text])


PATHS = {
    "train zero.yaml": "device",
    "train large.yaml": "large.yaml: .*x0000",
    "respond --prompts.path no.jsonl": "cannot read no.jsonl: No such file",
    "respond --prompts.path pipe.parquet": "pipe.parquet: it is a folder, a device or a pipe",
    "respond --prompts.path large.yaml": "large.yaml:1: the line is not JSON",
    f"respond --prompts.path {'p' * 300}": "ppp.*too long",
    "respond --output file --prompts.path good.jsonl": "file: File exists",
    "respond --output foreign --prompts.path good.jsonl": "has no responses.meta.json that tells what",
    "respond --output out --prompts.path good.jsonl --prompts.heldout-path heldout.jsonl": (
        "held-out prompt '7' .*also a training prompt, '4'"
    ),
    "respond --target no/such/folder": "there is no folder",
    "respond --target .": "has no config.json or adapter_config.json",
    "plan --output answers": "answers/responses.meta.json.*delete it",
    "plan --output spans": r"response_spans is \[\[0, 9\]\]",
    f"generate --target {TARGET} --prompt a --drafter no/drafter/here": "--drafter .*folder",
    f"check --target {TARGET} --drafter file": "--drafter .*folder",
    f"generate --target {TARGET}": "no prompt to answer",
    f"generate --target {TARGET} --prompt demo#nothing": "no prompt with the id 'nothing'",
}


@pytest.mark.parametrize("line", [*FLAGS, *RANGES, *PATHS], ids=lambda line: ascii(line)[:60])
def test_lines(line, refused, tmp_path):
    (tmp_path / "r.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**20)
    (tmp_path / "file").write_text("\n")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name, end in {"spans": 9, "answers": 3}.items():
        row = {"id": "a", "set": "s", "messages": [], "token_ids": [1, 2, 3], "response_spans": [[0, end]]}
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "responses.jsonl", [row])
    (tmp_path / "answers" / "responses.meta.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "responses.jsonl").write_text("another's")
    write_prompts(tmp_path / "good.jsonl", (f"q{i}" for i in range(12)))
    (tmp_path / "heldout.jsonl").write_text('{"prompt": " q3 ", "id": 7}')
    refused(line, (FLAGS | RANGES | PATHS)[line], code=2 if line in FLAGS else 1)


def test_a_bug_shows_its_traceback(monkeypatch):
    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr("dpace.verbs.respond.run", broken)
    with pytest.raises(TypeError, match="a bug"):
        main(["respond"])


def test_what_an_output_cannot_show_is_escaped(monkeypatch, capsys):
    monkeypatch.setattr("dpace.verbs.respond.run", lambda *_: print_text("\xe9\n"))
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="ascii") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert main(["respond"]) == 0
        assert written.getvalue() == b"\\xe9\n\n"


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["respond"]])
def test_a_full_disk_for_the_output_is_one_line(argv, monkeypatch, capsys):
    """Python itself finds it only at its end, and would print a traceback."""
    monkeypatch.setattr("dpace.verbs.respond.run", lambda *_: print("a text"))
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:  # closing it succeeds
        patch.setattr(sys, "stdout", full)
        assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("the output: No space left on device; make room", line)


def test_a_table_for_a_reader_who_has_enough_ends_as_other_texts_do(monkeypatch, capsys):
    class Enough(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr("dpace.verbs.respond.run", lambda *_: console().print("a table"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Enough())
        assert main(["respond"]) == 141


ERRORS = {
    r"/x: No space left on device; make room": OSError(28, "No space left on device", "/x"),
    "out of memory; free some, or lower batch sizes": MemoryError(),
    "out of memory; ": RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory"),
    r"the package wandb .*pip install wandb": ModuleNotFoundError("No module named 'wandb'", name="wandb"),
    r"a b \\x1b\[2J": ValueError("a\n  b\n \x1b[2J"),
}


@pytest.mark.parametrize("pattern", ERRORS)
def test_what_a_machine_lacks_is_explained(pattern, monkeypatch, capsys):
    monkeypatch.setattr("dpace.verbs.respond.run", mock.Mock(side_effect=ERRORS[pattern]))
    assert main(["respond"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^dpace respond: {pattern}", line), line


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "(default: )" not in "".join(lines)
    reads = importlib.import_module(f"dpace.verbs.{'import_' if verb == 'import' else verb}").ARGUMENTS
    takes_recipe = issubclass(reads.options, Recipe)
    assert takes_recipe == (verb in OF_RECIPES)
    assert (f"--{verb}.NAME may be written as --NAME." in lines) == (takes_recipe and hasattr(Recipe(), verb))
    assert any(line.startswith(f"usage: dpace {verb} [RECIPE]") for line in lines) == takes_recipe
    text = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    takes_folder = bool(reads.first) and verb != "generate"  # which takes a prompt there
    assert takes_folder == (verb in OF_FOLDERS)
    assert ("given first, or with this flag" in text) == (f"may stand first: dpace {verb} " in text) == takes_folder
    if verb == "respond":
        assert lines[0] == f"{VERBS[verb].capitalize()}." and "usage: dpace respond [RECIPE] [-h] [OPTIONS]" in lines
        assert len(lines) <= 120 and any("--train.*" in line for line in lines)
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help-all"])
        assert "--train.learning-rate" in capsys.readouterr().out
