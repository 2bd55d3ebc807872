"""The rooms that decode, with types and shapes checked in every call; all other tests leave them unchecked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("test_decode", "test_batch", "test_cache", "test_attention", "test_fusion", "test_stream")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_types_and_shapes_of_decoding(name):
    root = Path(__file__).parents[2]
    path = root / "tests" / "unit" / f"{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(path), "--jaxtyping-packages=dpace,beartype.beartype"]
    done = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
