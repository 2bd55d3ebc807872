"""Engines, a file each: what it can hold, how its files are written and read, its command and its part of the card."""

from importlib import import_module
from typing import TYPE_CHECKING, get_args

from dpace.config import EngineName

if TYPE_CHECKING:
    from dpace.engines.engine import Engine


def engine_of(name: EngineName) -> "Engine":
    """Import an engine, and with it what reads and writes its files."""
    return import_module(f"dpace.engines.{name}").ENGINE


def all_engines() -> list["Engine"]:
    """Import all engines."""
    return [engine_of(name) for name in get_args(EngineName)]
