"""What CONTRIBUTING.md and docs/architecture.md say about the code is true."""

import importlib
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from dpace.cli import VERBS
from dpace.config import Engine, LossConfig, Objective
from dpace.engines.card import serve_command
from dpace.loss import Slots
from dpace.loss.objective import make_weigh

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dpace"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
WORDS = sorted(set(re.findall(r"`([^`]+)`", PAGE)))
MODULES = [".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in SOURCE.rglob("*.py")]
WEIGHTS = {"medusa": "head_weights"}
"""Objectives whose function in `weights.py` has another name."""


@pytest.mark.parametrize("path", [word for word in WORDS if "/" in word or word.endswith((".py", ".md"))])
def test_files_exist(path):
    assert (ROOT / path).exists() or (SOURCE / path).exists()


@pytest.mark.parametrize("name", [word for word in WORDS if re.fullmatch(r"[a-z_]+\.[A-Za-z_]+(?<!\.py|\.md)", word)])
def test_names_exist(name):
    """In one of the modules of that name: `export` is a verb and what it runs."""
    module, attribute = name.split(".")
    assert any(
        hasattr(importlib.import_module(found), attribute)
        for found in MODULES
        if found.removesuffix(".__init__").endswith(f".{module}")
    )


@pytest.mark.parametrize("objective", get_args(Objective))
def test_every_objective_is_computed_documented_and_tested(objective):
    is_scored = torch.tensor([[[False, True, True, True]]])
    places = {"anchors": torch.zeros(1, 1, dtype=torch.long), "is_response": torch.ones(1, 8, dtype=torch.bool)}
    slots = Slots(is_scored, torch.full((1, 1, 4), 0.5), is_scored, None, **places)
    weights = make_weigh(LossConfig(objective=objective), 4)(slots)
    assert weights.shape == (1, 1, 4) and weights[0, 0, 0] == 0 and (weights[0, 0, 1:] > 0).all()
    assert f"\n| `{objective}` |" in (ROOT / "docs" / "objectives.md").read_text()
    function = WEIGHTS.get(objective, objective.replace("-", "_") + "_weights")
    assert f"{function}(" in (ROOT / "tests" / "unit" / "test_weights.py").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_file_and_a_command_in_the_readme(verb):
    module = importlib.import_module(f"dpace.verbs.{'import_' if verb == 'import' else verb}")
    assert callable(module.run)
    assert re.search(rf"^(dpace|make) {verb}\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("engine", get_args(Engine))
def test_every_engine_has_a_command_that_counts_the_block(engine):
    command = serve_command(engine, "DRAFTER", "TARGET", 8)
    assert "DRAFTER" in command
    assert re.search(r"\b[78]\b", command) or engine in ("transformers", "zlab")  # these read the drafter's config


def test_the_tree_is_that_of_the_source():
    """Every file has a phrase or, in `verbs`, a place in the list; and nothing else is named."""
    tree = re.search(r"src/dpace/\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), flags=re.DOTALL)
    assert tree
    folder, found = SOURCE, set()
    for line in tree[1].splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split()
        if indent == 2:
            folder = SOURCE / words[0] if words[0].endswith("/") else SOURCE
        if words:
            found |= {folder / word for word in words if folder.name == "verbs" and word.endswith(".py")}
            found |= {folder / words[0]} - {folder / f"{folder.name}/"}
    files = {path for path in SOURCE.rglob("*.*") if path.is_file() and path.suffix != ".pyc"}
    assert found == {path for path in files if path.name != "__init__.py"}
