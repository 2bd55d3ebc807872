"""The public names, their page and an objective of the user's own."""

import ast
import pkgutil
import re
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import get_args

import pytest
import torch

import dpace
import dpace.engines
import dpace.weights
from dpace.config import EngineName, ExportConfig, Objective
from dpace.loss.objective import source_sha256
from dpace.publish.card import write_card
from dpace.recipes.recipe_file import write_recipe
from dpace.training.run import make_datasets
from tests.support.files import change_json, read_json, write_prompts
from tests.support.models import make_recipe
from tests.support.scripts import run_script

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "reference" / "api.md"
SHORT = make_recipe(max_steps=2, eval_steps=2, logging_steps=1, num_anchors=4)


def test_every_public_name_is_there_and_on_its_page():
    assert all(callable(getattr(dpace, name)) for name in dpace.__all__)
    names, _, slots = API.read_text().partition("| field of `Slots` |")
    listed = [
        re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", part, flags=re.M))) for part in (names, slots)
    ]
    assert sorted(listed[0]) == dpace.__all__ and tuple(listed[1]) == dpace.Slots._fields
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dpace.trian  # noqa: B018


def test_train_is_the_function_also_once_its_package_is_loaded():
    import_module("dpace.training")
    assert isinstance(dpace.train, FunctionType) and type(sys.modules["dpace.training"]) is ModuleType


def test_written_names_are_those_of_the_code():
    """They are written by hand, since `dpace --help` imports neither weights nor engines."""
    stub = ast.parse(Path(dpace.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: f"dpace.{node.module}" for node in imports for alias in node.names} == dpace._PLACES
    weights = [name for name in vars(dpace.weights) if name.endswith("_weights")]
    assert [f"{name.replace('-', '_')}_weights" for name in get_args(Objective)] == weights
    files = {
        module.name: import_module(f"dpace.engines.{module.name}")
        for module in pkgutil.iter_modules(dpace.engines.__path__)
    }
    engines = {name: file.ENGINE.name for name, file in files.items() if hasattr(file, "ENGINE")}
    assert engines == {name: name for name in get_args(EngineName)}


def ones(slots: dpace.Slots) -> torch.Tensor:
    return torch.ones_like(slots.token_probs)


def test_an_objective_of_ones_own_is_recorded(language_target, language_responses, tmp_path):
    """It trains as the same weights of dpace do, bit by bit; changed source is another run."""
    parts = make_datasets(language_target, language_responses[:8], language_responses[50:52], SHORT)
    ours = dpace.train(language_target, *parts, SHORT, tmp_path / "own", weigh=ones)
    uniform = replace(SHORT, loss=replace(SHORT.loss, objective="uniform"))
    theirs = dpace.train(language_target, *parts, uniform, tmp_path / "uniform")
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, reference)

    name, sha256 = "tests.unit.test_api:ones", source_sha256(ones)
    run = read_json(tmp_path / "own" / "run.json")
    assert (run["loss.objective"], run["loss.objective_sha256"]) == (name, sha256)
    for record in (read_json(tmp_path / "own" / "provenance.json"), ours.config.dpace):
        assert (record["objective"], record["objective_sha256"]) == (name, sha256)
    config = ExportConfig(to="zlab", drafter="x", output="x", name="a/b", target="c/d")
    write_card(tmp_path, ours, config, folder=tmp_path / "own", source=ours, target=language_target)
    card = (tmp_path / "README.md").read_text()
    assert name in card and sha256 in card

    change_json(tmp_path / "own" / "run.json", **{"loss.objective_sha256": "0" * 64})
    named = replace(SHORT, loss=replace(SHORT.loss, objective=name))
    with pytest.raises(ValueError, match="other source of the objective .sha256 000000000000, not"):
        dpace.train(language_target, *parts, named, tmp_path / "own")


def make_power(exponent):
    def power(slots):
        return slots.token_probs**exponent

    return power


def test_what_a_function_took_along_is_part_of_its_hash():
    assert source_sha256(make_power(1.0)) == source_sha256(make_power(1.0)) != source_sha256(make_power(2.0))
    assert source_sha256(torch.no_grad()(ones)) == source_sha256(ones)
    with pytest.raises(ValueError, match="power cannot be recorded"):
        source_sha256(make_power(torch.ones(1)))


def test_what_a_function_calls_in_its_module_is_part_of_its_hash(tmp_path, monkeypatch):
    """Not in a script, whose other lines do not matter."""
    hashes = []
    for name in ("__main__", "own"):
        for value in (1, 2):
            source = f"def weigh(slots):\n    return helper()\n\ndef helper():\n    return {value}\n"
            path = tmp_path / f"own{value}.py"
            path.write_text(source)
            module = ModuleType(name)
            module.__file__ = str(path)
            exec(compile(source, path, "exec"), vars(module))
            monkeypatch.setitem(sys.modules, "own", module)
            hashes.append(source_sha256(module.weigh))
    assert hashes[0] == hashes[1] and hashes[2] != hashes[3]


def test_the_examples_train(language_folder, language_prompts, tmp_path, monkeypatch, capsys):
    """From prompts to a drafter that decodes, with the objective of the other example, which the page prints."""
    blocks = re.findall(r"```python\n(.*?)```", API.read_text(), flags=re.DOTALL)
    (printed,) = (block for block in blocks if "def weigh" in block)
    assert printed in (ROOT / "examples" / "objective.py").read_text()
    for name in ("train.py", "objective.py"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    prompts = replace(SHORT.prompts, path=write_prompts(tmp_path / "prompts.jsonl", language_prompts[:24]))
    recipe = replace(SHORT, target=str(language_folder), output=str(tmp_path / "out"), prompts=prompts)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.syspath_prepend(tmp_path)
    run_script(tmp_path / "train.py", tmp_path / "recipe.yaml")
    assert re.search(r"tau \d\.\d\d", capsys.readouterr().out)
    run = read_json(tmp_path / "out" / "drafter" / "run.json")
    assert run["loss.objective"] == "objective:weigh"
    monkeypatch.delitem(sys.modules, "objective")
