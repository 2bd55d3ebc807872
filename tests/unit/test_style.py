"""What can be held of the house style: sizes, first lines, help texts, and who uses whose private names."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_FIRST_LINE = 300, 60, 100
TREES = {path: ast.parse(path.read_text()) for path in FILES}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def names(path: Path) -> str:
    return str(path.relative_to(SOURCE / "dpace"))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_and_functions_fit(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE
    for node in ast.walk(TREES[path]):
        if isinstance(node, FUNCTIONS) and node.end_lineno:
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{node.name} is longer than {MAX_FUNCTION} lines"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_docstrings(path):
    """Every public thing has one; a first line is short and is not of the kind "X in; Y out"."""
    inner = {child for node in ast.walk(TREES[path]) if isinstance(node, FUNCTIONS) for child in ast.walk(node)} - {
        node for node in TREES[path].body
    }
    members = {m for node in TREES[path].body if isinstance(node, ast.ClassDef) for m in node.body}
    for node in ast.walk(TREES[path]):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        name, text = getattr(node, "name", "the module"), ast.get_docstring(node)
        is_public = not name.startswith("_") and (node not in inner or node in members)
        assert text or not is_public, f"{name} has no docstring"
        first = (text or "").partition("\n")[0]
        assert len(first) <= MAX_FIRST_LINE, f"{name}: {first}"
        assert not first.startswith("Of ") and " in; " not in first, f"{name}: {first}"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_what_is_said_of_fields_and_constants(path):
    """It becomes `--help`, and stands alone there."""
    for node in ast.walk(TREES[path]):
        for body in (getattr(node, "body", []),):
            for before, after in zip(body, body[1:], strict=False) if isinstance(body, list) else ():
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if is_text and isinstance(before, (ast.Assign, ast.AnnAssign)):
                    assert not str(after.value.value).startswith("Of "), after.value.value


@pytest.mark.parametrize("path", FILES, ids=names)
def test_private_names_stay_in_their_file(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpace"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_no_call_leaves_something_for_the_next(path):
    """No name of a module is assigned by a function, and no registry of a module is filled by one."""
    for node in ast.walk(TREES[path]):
        assert not isinstance(node, ast.Global)
    for node in TREES[path].body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call):
            assert "Weak" not in ast.unparse(value.func), ast.unparse(node)


def test_every_option_has_help():
    for path in [*SOURCE.rglob("config/*.py"), SOURCE / "dpace" / "demo" / "recipe.py", *SOURCE.rglob("verbs/*.py")]:
        module = importlib.import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts))
        for config in vars(module).values():
            if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
                continue
            if config.__module__ != module.__name__:
                continue
            (tree,) = (n for n in TREES[path].body if isinstance(n, ast.ClassDef) and n.name == config.__name__)
            for field, text in zip(tree.body, tree.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(text, ast.Expr), f"{config.__name__}.{ast.unparse(field.target)} has no help"
