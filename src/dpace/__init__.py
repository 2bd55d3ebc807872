"""Train parallel drafters with D-PACE and decode Hugging Face causal LMs faster, with the same text.

The names of `__init__.pyi` are loaded when they are first used, so that `import dpace` takes no time.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))
_PLACES = {
    alias.name: f"dpace.{node.module}"
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load a name of `__all__`."""
    if name not in _PLACES:
        raise AttributeError(f"module 'dpace' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
