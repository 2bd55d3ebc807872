"""Turn dataclasses into JSON and back; reading checks every key and type against the annotations."""

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")
MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""


def optional() -> Any:
    """Declare a field whose key is left out of the file where the field is None."""
    return field(default=None, metadata={"is_optional": True})


def to_json(value: Any) -> Any:
    """Write dataclasses as objects and tuples as lists; what `from_json` reads."""
    if is_dataclass(value):
        items = ((entry, getattr(value, entry.name)) for entry in fields(value))
        return {e.name: to_json(v) for e, v in items if v is not None or not e.metadata.get("is_optional")}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(kind: type[Kind], value: Any, where: str = "") -> Kind:
    """Read what `json.loads` gave as a dataclass.

    Numbers of `float` fields may be written as integers; they have to be finite.

    Args:
        kind: a dataclass of str, int, float, bool, None, Literal, list, dict with str keys, tuple, and dataclasses.
        value: what was read.
        where: what the message puts before a key, such as `rows[3]`.

    Raises:
        ValueError: missing or unknown keys, or another type; says where, what was found and what was expected.
    """
    return _read(kind, value, where)


def _read(kind: Any, value: Any, where: str) -> Any:
    read = _READERS.get(get_origin(kind) or kind, _read_object if is_dataclass(kind) else _read_scalar)
    return read(kind, value, where)


def _refuse(kind: Any, value: Any, where: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    return ValueError(f"{where or 'the file'} is {shown}, expected {_words(kind)}")


def _words(kind: Any) -> str:
    """What JSON has to hold for a type."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin in (Union, UnionType):
        return " or ".join(map(_words, options))
    if origin in (list, tuple):
        return "a list" if origin is list else f"a list of {len(options)}"
    scalars = {float: "a finite number", int: "an integer", str: "a string", bool: "true or false", NoneType: "null"}
    return scalars.get(kind, "an object")


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise _refuse(kind, value, where)
    return value


def _read_float(kind: Any, value: Any, where: str) -> float:
    if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
        raise _refuse(kind, value, where)
    return float(value)


def _read_literal(kind: Any, value: Any, where: str) -> Any:
    if not any(type(value) is type(allowed) and value == allowed for allowed in get_args(kind)):
        raise _refuse(kind, value, where)
    return value


def _read_union(kind: Any, value: Any, where: str) -> Any:
    options = get_args(kind)
    if value is None and NoneType in options:
        return None
    options = [option for option in options if option is not NoneType]
    if len(options) == 1:
        return _read(options[0], value, where)  # its message says more
    for option in options:
        try:
            return _read(option, value, where)
        except ValueError:
            continue
    raise _refuse(kind, value, where)


def _read_list(kind: Any, value: Any, where: str) -> list:
    [item_kind] = get_args(kind)
    if not isinstance(value, list):
        raise _refuse(kind, value, where)
    if item_kind in (int, str) and set(map(type, value)) <= {item_kind}:
        return value  # token ids are many
    return [_read(item_kind, item, f"{where}[{i}]") for i, item in enumerate(value)]


def _read_tuple(kind: Any, value: Any, where: str) -> tuple:
    kinds = get_args(kind)
    if not isinstance(value, list) or len(value) != len(kinds):
        raise _refuse(kind, value, where)
    return tuple(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _read_dict(kind: Any, value: Any, where: str) -> dict:
    _, item_kind = get_args(kind)
    if not isinstance(value, dict):
        raise _refuse(kind, value, where)
    return {key: _read(item_kind, item, f"{where}[{key!r}]") for key, item in value.items()}


def _read_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _refuse(kind, value, where)
    kinds, required = _kinds(kind)
    inside = f" in {where}" if where else ""
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{', '.join(missing[:5])} missing{inside}, expected {', '.join(sorted(required))}")
    if unknown := sorted(value.keys() - kinds.keys()):
        names = ", ".join(repr(name[:MAX_SHOWN]) for name in unknown[:5])
        raise ValueError(f"unknown {names}{inside}, expected {', '.join(sorted(kinds))}")
    prefix = f"{where}." if where else ""
    return kind(**{name: _read(kinds[name], item, f"{prefix}{name}") for name, item in value.items()})


@cache
def _kinds(kind: type) -> tuple[dict[str, Any], set[str]]:
    """The types of a dataclass's fields, and the names of those that are always written."""
    required = {entry.name for entry in fields(kind) if not entry.metadata.get("is_optional")}
    return get_type_hints(kind), required


_READERS: dict[Any, Callable[[Any, Any, str], Any]] = {
    Literal: _read_literal,
    Union: _read_union,
    UnionType: _read_union,
    float: _read_float,
    list: _read_list,
    tuple: _read_tuple,
    dict: _read_dict,
}
