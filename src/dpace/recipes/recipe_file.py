"""Read and write YAML recipes: a file comes in, settings that fit their options go out, and the other way."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpace.config import Recipe
from dpace.recipes.validation import from_json, to_json
from dpace.system.ledger import read_text, write_text
from dpace.system.progress import one_line, quoted

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
MAX_BYTES = 2**20
"""Bytes of the largest recipe."""


def read_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        ValueError: the file, the key and the value of what is wrong, and what was expected.
    """
    return read_settings(path, Recipe)[0]


def read_settings(path: str | Path, config_class: type[AnyRecipe]) -> tuple[AnyRecipe, dict[str, Any]]:
    """Read a YAML recipe; return also the settings that it has, without defaults.

    Raises:
        ValueError: the file, the key and the value of what is wrong, and what was expected.
    """
    text = read_text(path, "a YAML file of options", max_bytes=MAX_BYTES)
    try:
        values = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = one_line(str(error).replace('in "<unicode string>", ', ""))
        raise ValueError(f"cannot read the recipe {path}: {reason}; name a YAML file of options") from error
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {path} holds {quoted(values)}; expected lines such as `name: value`")
    try:
        return from_json(config_class, values), values
    except ValueError as error:
        how = " (a text in quotes)" if "expected a text" in str(error) else ""
        fix = f"change it{how}, or leave the line out for the default"
        raise ValueError(f"the recipe {path}: {error}; {fix}") from error


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every value, defaults too, so that the file alone repeats the run; passwords are left out."""
    write_text(path, yaml.dump(without_passwords(to_json(recipe)), Dumper=_Dumper, sort_keys=False))


def without_passwords(value: Any) -> Any:
    """Leave user and password out of all addresses in nested settings; other values stay."""
    if isinstance(value, dict):
        return {name: without_passwords(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(item) for item in value]
    return re.sub(r"(?i)^(\s*https?://)[^/]*@", r"\1", value) if isinstance(value, str) else value


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases and tags, with each key once, and with numbers as YAML 1.2 reads them.

    YAML 1.1 reads 1e-3 as a text, 1:30 as 90 and 010 as 8.
    """

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse tags, and aliases, which can stand for more than memory holds."""
        event: Any = self.peek_event()
        if getattr(event, "tag", None):
            raise _Refused(event.start_mark, f"recipes take no tags ({event.tag})", "write the value without it")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(event.start_mark, "recipes take no anchors (&) and aliases (*)", "write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is given twice."""
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise _Refused(key.start_mark, f"the key {name!r} is given twice", "remove one of them")
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Refused(yaml.YAMLError):
    """A reason to refuse a recipe, with its line."""

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
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _characters)


class _Dumper(yaml.SafeDumper):
    """YAML that `PlainLoader` reads back: texts that it would take for something else stand in quotes."""

    yaml_implicit_resolvers = PlainLoader.yaml_implicit_resolvers
