"""What is installed from the source archive and the wheel is complete, and works without the repository."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dpace
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
