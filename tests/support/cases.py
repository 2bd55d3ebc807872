"""Which cases of a test run by default."""

from collections.abc import Iterable
from typing import Any

import pytest


def wide(cases: Iterable[Any], *default: Any) -> list[Any]:
    """Leave these cases among the default tests, and give the others the marker `wide`; `.ci/run` runs both."""
    return [case if case in default else pytest.param(case, marks=pytest.mark.wide) for case in cases]
