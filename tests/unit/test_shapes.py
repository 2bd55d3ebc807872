"""Rooms with tensors, with types and shapes checked in every call; all other tests leave them unchecked."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.wide
@pytest.mark.parametrize("room", ["batches", "decode", "drafter", "fast", "measure", "target", "training"])
def test_types_and_shapes(room):
    """But for compiled steps, in which checks cannot be traced, and requests that the types refuse."""
    folder = Path(__file__).parent / room
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(folder), "--jaxtyping-packages=dpace,beartype.beartype"]
    command += ["-k", "not compiled_steps_of_fixed_shapes and not bad_requests"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
