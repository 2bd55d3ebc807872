"""What holds for all tests: one thread, and types and shapes that are checked where training computes.

Tiny models gain nothing from threads, and wait long for one another on a busy machine; `OMP_NUM_THREADS` sets another
number. Checks of every call would take half of the time that decoding takes: `test_shapes.py`, which is not among the
default tests, runs the tests of decoding with them.
"""

import os

from jaxtyping import install_import_hook

CHECKED = {"batches", "blocks", "loss", "measure", "metrics", "training", "weights"}
"""Modules and rooms of dpace with tensors, but for those that are called for each token and layer."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
install_import_hook([f"dpace.{name}" for name in sorted(CHECKED)], "beartype.beartype")
