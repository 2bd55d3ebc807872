"""Check options and JSON objects against the types of their dataclasses, with pydantic.

What comes in is a dataclass and the values for it, from a recipe, from flags or from a JSON file. What goes out is an
instance of it, or one line that names the key, the value, what was expected and a way out. Types, ranges and choices
stand in the dataclass itself; `dpace.config` has the classes of all options.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from dpace.system.progress import quoted

Kind = TypeVar("Kind")
UNION_WORDS = ("int", "float", "str", "bool")


class UsageError(ValueError):
    """A flag that is unknown, or whose value is none of its values."""


adapter = cache(TypeAdapter)
"""Makes what checks and writes the values of a class; making it takes milliseconds."""


to_json = to_jsonable_python
"""Returns dataclasses as objects and tuples as lists; what `from_json` reads."""


def from_json(kind: type[Kind], value: object) -> Kind:
    """Return what `json.loads` gave as a dataclass.

    Types are JSON's, without conversions: "1", true and 1.0 are no integers; 1 is a float, too. Ranges are given by
    `pydantic.Field` in the annotations. A key whose field has a default may be missing, and others may not be there.

    Args:
        kind: made by `dpace.config.options`, of str, int, float, bool, None, Literal, list, dict, tuple and such
            dataclasses, at any depth.
        value: what was read.

    Raises:
        ValueError: missing or unknown keys, a value of another type or outside its range, or a number that is not
            finite; one line with the key, such as `rows[3].tau`, the value and what was expected.
    """
    try:
        # Through JSON once more: only there does the strict mode of pydantic take a list for a tuple.
        return adapter(kind).validate_json(json.dumps(value, ensure_ascii=False).encode())
    except ValidationError as error:
        raise ValueError(describe_invalid(error, kind)) from error


def read_as(kind: type[Kind], value: object, path: str | Path, fix: str) -> Kind:
    """Return what a file holds as a dataclass; a fault names the file and the way out.

    Raises:
        ValueError: see `from_json`.
    """
    try:
        return from_json(kind, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {fix}") from error


def describe_invalid(error: ValidationError, kind: Any) -> str:
    """Return in one line what is wrong first, in the words of pydantic.

    Args:
        error: of pydantic.
        kind: the dataclass that was checked.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda found: found["type"] == "missing")  # a typo says more
    place = first["loc"]
    name = _name(place)
    match first["type"]:
        case "missing":
            return f"{name} is missing"
        case "unexpected_keyword_argument":
            return _describe_unknown(place, kind)
        case "value_error":  # of a check in dpace.config, whose message goes on from the name
            return f"{name} {first.get('ctx', {})['error']}"
    # Each type of a union gives an error of its own for the same key.
    messages = dict.fromkeys(found["msg"] for found in errors if _name(found["loc"]) == name)
    reasons = [re.sub("^(Input should be|Value error,|Value should have) ", "", message) for message in messages]
    return f"{name or 'the file'} is {quoted(first['input'])}, expected {' or '.join(reasons)}"


def _describe_unknown(place: Sequence[int | str], kind: Any) -> str:
    """Say that there is no such key, and which one may have been meant."""
    *groups, key = place
    for group in groups:
        kind = get_type_hints(kind).get(str(group)) if is_dataclass(kind) else None
    meant = ""
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        for name in difflib.get_close_matches(str(key), names, n=1):
            meant = f" (did you mean {name}?)"
    path = f"{_name(groups)}.{key}".removeprefix(".")
    return f"there is no key {quoted(path)}{meant}"


def _name(place: Sequence[int | str]) -> str:
    """Write a place as `rows[3].tau`, without the words by which pydantic tells the types of a union apart."""
    name = ""
    for step in place:
        if isinstance(step, int):
            name += f"[{step}]"
        elif step.isidentifier() and step not in UNION_WORDS:
            name += f".{step}"
    return name.removeprefix(".")
