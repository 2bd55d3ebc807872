"""The small model that proposes blocks, and what others know of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpace.drafter.drafter import Drafter as Drafter
    from dpace.drafter.drafter import load_drafter as load_drafter


def __getattr__(name: str) -> Any:
    """Load a name of `dpace.drafter.drafter` when it is first used."""
    if name not in ("Drafter", "load_drafter"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dpace.drafter.drafter"), name)
