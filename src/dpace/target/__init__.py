"""The frozen model: found, loaded, spread over ranks, asked."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpace.target.target import Target as Target


def __getattr__(name: str) -> Any:
    """Load a name of `dpace.target.target` when it is first used."""
    return getattr(import_module("dpace.target.target"), name)
