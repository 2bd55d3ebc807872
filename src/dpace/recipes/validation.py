"""Check options and JSON objects against the types of their dataclasses, with pydantic.

What comes in is a dataclass and the values for it, from a recipe, from flags or from a JSON file. What goes out is an
instance of it, or one line that names the key, the value, what was expected and a way out. Types, ranges and choices
stand in the dataclass itself; `dpace.config` has those of all options.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dpace.config import STRICT
from dpace.system.progress import quoted

Kind = TypeVar("Kind")


class UsageError(ValueError):
    """A flag that is unknown, or whose value is none of its values."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def json_object(kind: Any) -> Any:
    """Make a dataclass from a class whose fields are the keys of an object in a file, with their types."""
    return dataclass(kind, frozen=True, kw_only=True)


def optional() -> Any:
    """Declare a field whose key is left out of the file where the field is None."""
    return field(default=None, metadata={"is_optional": True})


def to_json(value: Any) -> Any:
    """Return dataclasses as objects and tuples as lists; what `from_json` reads."""
    if is_dataclass(value):
        items = ((entry, getattr(value, entry.name)) for entry in fields(value))
        return {e.name: to_json(v) for e, v in items if v is not None or not e.metadata.get("is_optional")}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(kind: type[Kind], value: Any) -> Kind:
    """Return what `json.loads` gave as a dataclass.

    Types are those of JSON, without conversions: "1", true and 1.0 are no integers; 1 is a float, too. Ranges are those
    of `pydantic.Field` in the annotations. A key whose field has a default may be missing, and others may not be there.

    Args:
        kind: a dataclass of str, int, float, bool, None, Literal, list, dict, tuple and dataclasses, at any depth.
        value: what was read.

    Raises:
        ValueError: missing or unknown keys, a value of another type or outside its range, or a number that is not
            finite; one line with the key, such as `rows[3].tau`, the value and what was expected.
    """
    try:
        (checked,) = _adapter(kind).validate_json(json.dumps([value], ensure_ascii=False).encode())
    except ValidationError as error:
        raise ValueError(explain(error, kind, skip=1)) from error
    return checked


@cache
def _adapter(kind: type) -> TypeAdapter:
    """Return the checks of a list of one dataclass, which hands its config on to it; making them takes milliseconds."""
    return TypeAdapter(tuple[kind], config=STRICT)


def explain(error: ValidationError, kind: type, *, skip: int = 0) -> str:
    """Return in one line what is wrong first.

    Args:
        error: of pydantic.
        kind: the dataclass that was checked.
        skip: number of keys that lead to it.
    """
    first = min(error.errors(include_url=False), key=lambda found: found["type"] == "missing")  # a typo says more
    name, group, hint = _find(kind, first["loc"][skip:])
    keys = [entry.name for entry in fields(group)] if is_dataclass(group) else []
    match first["type"]:
        case "missing":
            return f"{name} is missing, expected {expected(hint)}"
        case "unexpected_keyword_argument":
            key = name.split(".")[-1]
            close = difflib.get_close_matches(key, keys, n=1)
            meant = f"did you mean {name.removesuffix(key)}{close[0]}?" if close else f"there are {', '.join(keys)}"
            return f"there is no key {quoted(name)} ({meant})"
        case "value_error":  # of a check in dpace.config, whose message goes on from the name
            return f"{name} {first.get('ctx', {})['error']}"
    return f"{name or 'the file'} is {quoted(first['input'])}, expected {expected(hint)}"


def _find(kind: Any, path: Sequence[int | str]) -> tuple[str, Any, Any]:
    """Find what stands at a path, which may end with words of pydantic.

    Returns:
        Its name, such as `rows[3].tau`, the dataclass it belongs to, and its type.
    """
    name, group = "", kind
    for part in path:
        kind = _without_none(kind)
        items = [item for item in get_args(kind) if item is not Ellipsis]
        if is_dataclass(kind):
            group, name = kind, f"{name}.{part}" if name else str(part)
            kind = get_type_hints(kind, include_extras=True).get(str(part))
        elif get_origin(kind) in (list, tuple, dict):
            name += f"[{part!r}]"
            kind = items[min(int(part), len(items) - 1)] if get_origin(kind) is tuple else items[-1]
        else:
            break
    return name, group, kind


def _without_none(kind: Any) -> Any:
    """Return a type without its annotations, and the only one of `kind | None`."""
    kind = kind.__origin__ if hasattr(kind, "__metadata__") else kind
    options = [option for option in get_args(kind) if option is not NoneType]
    return _without_none(options[0]) if get_origin(kind) in (Union, UnionType) and len(options) == 1 else kind


def expected(kind: Any) -> str:
    """Return in words what a type takes: its description if it has one, else its choices or what JSON calls it."""
    for note in getattr(kind, "__metadata__", ()):
        if isinstance(note, FieldInfo) and note.description:
            return note.description
    kind = kind.__origin__ if hasattr(kind, "__metadata__") else kind
    options = list(get_args(kind))
    origin = get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}" if len(options) > 1 else repr(options[0])
    if origin in (Union, UnionType):
        return " or ".join(map(expected, options))
    if origin in (list, tuple):
        return f"a list, each entry {expected(options[0])}"
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text", NoneType: "null"}
    return words.get(kind, "an object")
