"""Engines, a file each: what it can hold, how its files are written and read, its command and its part of the card."""

from importlib import import_module
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from dpace.engines.engine import Engine

EngineName = Literal["vllm", "sglang", "tensorrt", "transformers", "zlab", "speculators", "gguf"]
"""The files, in the order of the model card; gguf is llama.cpp's."""


def engine_of(name: EngineName) -> "Engine":
    """Import an engine, and with it what reads and writes its files."""
    return import_module(f"dpace.engines.{name}").ENGINE


def all_engines() -> list["Engine"]:
    """Import all engines."""
    return [engine_of(name) for name in get_args(EngineName)]
