"""Hostile command lines end in one line that names the thing and a way out, before any model is loaded."""

import re
from collections import Counter

import pytest

from dpace.cli import VERBS, main
from tests.support.hostile import CASES, Case


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    """No case is to come as far as loading a model."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.name))
def test_one_line(case: Case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = case.make(tmp_path)
    assert main(args) == case.code
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"dpace {args[0]}: ") and re.search(case.names, line), line
    assert ";" in line, "there is a way out"
    assert line.isprintable() and len(line) < 1000 and not printed.out


def test_there_are_many():
    counts = Counter(case.name.partition(":")[0].split()[0] for case in CASES)
    assert len(CASES) >= 250 and len({case.name for case in CASES}) == len(CASES), counts


def test_a_bug_shows_its_traceback(monkeypatch):
    def broken(_):
        raise TypeError("a bug")

    monkeypatch.setattr("dpace.verbs.respond.run", broken)
    with pytest.raises(TypeError, match="a bug"):
        main(["respond"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_what_a_machine_lacks(verb, monkeypatch, capsys):
    module = f"dpace.verbs.{'import_' if verb == 'import' else verb}.run"
    errors = {
        r"/x: No space left on device; make room": OSError(28, "No space left on device", "/x"),
        r"/x: Permission denied; change": PermissionError(13, "Permission denied", "/x"),
        r"out of memory \(MemoryError\); ": MemoryError(),
        r"out of memory .*not enough memory.*; ": RuntimeError("DefaultCPUAllocator: not enough memory: tried 9 bytes"),
        r"the package wandb .*pip install wandb": ModuleNotFoundError("No module named 'wandb'", name="wandb"),
        r"a file: Broken pipe; fix this": BrokenPipeError(32, "Broken pipe"),
        r"a b \\x1b\[2J": ValueError("a\n  b\n \x1b[2J"),
    }
    for pattern, error in errors.items():
        monkeypatch.setattr(module, lambda _, error=error: (_ for _ in ()).throw(error))
        assert main([verb]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(f"^dpace {verb}: {pattern}", line), line
