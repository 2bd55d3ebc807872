"""Scripts that are run as their command lines run them."""

import runpy
from pathlib import Path
from unittest import mock

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_script(name: str | Path, *args: object) -> None:
    """A script of benchmarks/, or another one by its path."""
    with mock.patch("sys.argv", [str(name), *map(str, args)]):
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
