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
    text = read_text(path, "a YAML file of options")
    try:
        values = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the recipe {path}: {one_line(error)}; name a YAML file of options") from error
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {path} holds {quoted(values)}; expected lines such as `name: value`")
    try:
        return from_json(config_class, values), values
    except ValueError as error:
        raise ValueError(f"the recipe {path}: {error}; change it, or leave the line out for the default") from error


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
    """YAML with each key once, and with 1e-3 as a number, which YAML 1.1 reads as a text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is given twice."""
        names = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} is given twice", problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML that `PlainLoader` reads back: texts that it would take for something else stand in quotes."""


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _kind in (PlainLoader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
