"""What holds for all tests: one thread, and types and shapes that are checked where tensors are not decoded in loops.

Tiny models gain nothing from threads, and wait long for one another on a busy machine; `OMP_NUM_THREADS` sets another
number. Checks of every call would take half of the time that decoding takes: `test_shapes.py`, which is not among the
default tests, runs the tests of these rooms with them.
"""

import os
import pkgutil
from importlib.util import find_spec

from jaxtyping import install_import_hook

UNCHECKED = {"decode", "drafter", "fast", "modeling_dflash", "target"}
"""Modules and rooms of dpace that are called for each token and layer."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
_package = find_spec("dpace")
assert _package is not None and _package.submodule_search_locations
_names = [module.name for module in pkgutil.iter_modules(_package.submodule_search_locations)]
install_import_hook([f"dpace.{name}" for name in _names if name not in UNCHECKED], "beartype.beartype")
