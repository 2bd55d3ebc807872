"""Loads what the tests share into the processes that run them."""

import gc
import importlib

import pytest

MODELS = "tests.support.models"
pytest.register_assert_rewrite(MODELS)


def pytest_configure(config: pytest.Config) -> None:
    """Leave it out of a process that only hands out tests: it imports torch, transformers and dpace."""
    gc.disable()
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(importlib.import_module(MODELS), MODELS)


def pytest_collection_finish() -> None:
    """Collect garbage of the tests only: what was imported stays, and would be walked through again and again."""
    gc.freeze()
    gc.enable()
