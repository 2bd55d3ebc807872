"""Read a YAML recipe as nested settings, each checked against the option that it is for."""

import difflib
import re
from collections.abc import Hashable
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from dpace.config import ObjectiveName, is_objective
from dpace.recipes.ranges import objective_words
from dpace.system.ledger import read_text
from dpace.system.progress import printable

MAX_BYTES = 2**20
"""Bytes of the largest recipe."""
MAX_DEPTH = 20
"""Levels of lists and mappings in a recipe; its options need three."""
MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases and tags, with each key once, and with numbers as YAML 1.2 reads them.

    YAML 1.1 reads 1e-3 as a text, 1:30 as 90 and 010 as 8.
    """

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, which can stand for more than memory holds, and endless depth."""
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(event.start_mark, "recipes take no anchors (&) and aliases (*)", "write the value out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(event.start_mark, f"there are more than {MAX_DEPTH} levels", "write one option on each line")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is given twice or is no name."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _Refused(key_node.start_mark, f"the key {key!r} is not a name", "name an option")
            if key in seen:
                raise _Refused(key_node.start_mark, f"the key {key!r} is given twice", "remove one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Refused(yaml.YAMLError):
    """What is wrong in a recipe, and where."""

    def __init__(self, mark: Any, found: str, fix: str):
        super().__init__(f"line {mark.line + 1}: {found}; {fix}")


_RESOLVERS = {
    "bool": (r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "tTfFyYnNoO"),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "int": (r"[-+]?(0|[1-9][0-9_]{0,30})", "-+0123456789"),
    "float": (
        r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
for _kind, (_pattern, _first) in _RESOLVERS.items():
    _characters = [*_first, *([""] if _kind == "null" else [])]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _characters)


def read_settings(path: str | Path, config_class: type) -> dict[str, Any]:
    """Read the settings of a recipe.

    Args:
        path: a YAML file.
        config_class: the dataclass whose options it sets.

    Raises:
        ValueError: the file, the key and the value of what is wrong, and what was expected.
    """
    text = read_text(path, "a YAML file of options", max_bytes=MAX_BYTES)
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ValueError(f"cannot read the recipe {path}: {reason}; name a YAML file of options") from error
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {path} holds {_shown(values)}; expected lines such as `name: value`")
    _check_group(config_class, values, f"the recipe {path}: ", "")
    return values


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: texts that are no plain words stand in quotes."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if re.match("[A-Za-z]", text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_settings(values: dict[str, Any]) -> str:
    """Write settings as YAML that `read_settings` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _check_group(kind: type, values: dict, where: str, prefix: str) -> None:
    """Check the names and the types of a group of settings."""
    kinds = get_type_hints(kind)
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            fix = f"did you mean {prefix}{close[0]}?" if close else f"expected {', '.join(kinds)}"
            raise ValueError(f"{where}there is no option {_shown(prefix + key)}; {fix}")
        if name != key and name in values:
            raise ValueError(f"{where}{prefix}{name} is given twice; remove one of them")
        if is_dataclass(kinds[name]):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{where}{prefix}{name} is {_shown(value)}, expected a group of options; indent them below it"
                )
            _check_group(kinds[name], value, where, f"{prefix}{name}.")
        elif not _fits(kinds[name], value):
            words = _words(kinds[name])
            needs_quotes = "a text" in words and not isinstance(value, str | list | dict | None)
            fix = "put quotes around it" if needs_quotes else "change it, or leave the line out for the default"
            raise ValueError(f"{where}{prefix}{name} is {_shown(value)}, expected {words}; {fix}")


def _fits(kind: Any, value: Any) -> bool:
    """Say whether a value of YAML is of an option's type."""
    options, origin = get_args(kind), get_origin(kind)
    if kind == ObjectiveName:
        return is_objective(value)
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin is tuple:
        return all(_fits(options[0], item) for item in (value if isinstance(value, list) else [value]))
    if options:
        return any(_fits(option, value) for option in options)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _words(kind: Any) -> str:
    """Say what an option takes."""
    options, origin = get_args(kind), get_origin(kind)
    if kind == ObjectiveName:
        return objective_words()
    if origin is Literal:
        return "one of " + ", ".join(map(str, options))
    if origin is tuple:
        return f"a list, each entry {_words(options[0])}"
    if options:
        return " or ".join(map(_words, options))
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}[kind]


def _shown(value: Any) -> str:
    """Write a value of the recipe for a message."""
    text = printable("null" if value is None else repr(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
