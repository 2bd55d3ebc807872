"""Read and write YAML recipes: a file comes in, settings that fit their options go out, and the other way."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpace.config import Recipe
from dpace.system.ledger import JsonObject, read_text, write_text
from dpace.system.progress import one_line, quoted
from dpace.system.validation import from_json, to_json

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        ValueError: the file, the key and the value of what is wrong, and what was expected.
    """
    return read_settings(path, Recipe)[0]


def read_settings(path: str | Path, config_class: type[AnyRecipe]) -> tuple[AnyRecipe, JsonObject]:
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
    except (ValueError, TypeError) as error:
        raise ValueError(f"the recipe {path}: {error}; change it, or leave the line out for the default") from error


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every value, defaults too, so that the file alone repeats the run."""
    write_text(path, yaml.dump(to_json(recipe), Dumper=_Dumper, sort_keys=False))


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, with each key once."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases, which can stand for more than memory holds; recipes of foreign drafters are read too."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # line and column, which the message has
            raise yaml.MarkedYAMLError(problem="recipes take no aliases (*)", problem_mark=mark)
        return super().compose_node(parent, index)

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
    """YAML that `PlainLoader` reads back."""


# A folder may be named after a day. And YAML 1.1 takes 1e-3 for a text, since it has no dot.
PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", PlainLoader.construct_yaml_str)
for _kind in (PlainLoader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
