"""Turn recipes and command-line flags into configs, and configs into recipes."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dpace.config import Recipe


def parse(config_class, verb: str, args: list[str]):
    """Read a verb's options from its recipe and flags."""
    import tyro

    recipe = []
    if args and args[0].endswith((".yaml", ".yml")):
        recipe, args = recipe_flags(args[0]), args[1:]
    args = [*recipe, *(_with_group(config_class, verb, arg) for arg in args)]
    return tyro.cli(config_class, prog=f"dpace {verb}", args=args)


def _with_group(config_class, verb: str, arg: str) -> str:
    """A verb's own group may be left out: `dpace bench --sets` is `dpace bench --bench.sets`."""
    groups: dict[str, Any] = {field.name: field.default_factory for field in fields(config_class)}
    name = arg.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    if not arg.startswith("--") or name in groups or verb not in groups:
        return arg
    is_own = name in {field.name for field in fields(groups[verb])}
    prefix = f"--{verb}.no-" if arg.startswith("--no-") else f"--{verb}."
    return prefix + arg.removeprefix("--").removeprefix("no-") if is_own else arg


def first_as(name: str, args: list[str]) -> list[str]:
    """Let values that stand first be those of a flag."""
    return [f"--{name}", *args] if args and not args[0].startswith("-") else args


def command(verb: str, **flags) -> str:
    """A command to copy."""
    return " ".join([f"dpace {verb}", *(f"--{name} {value}" for name, value in flags.items())])


def recipe_flags(path: str | Path) -> list[str]:
    """Turn a YAML recipe into the flags that it writes down, `--group.name value`.

    Raises:
        ValueError: the file cannot be read or is not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {path} holds {values!r}; expected `name: value` lines")
    return list(_flags(values, ""))


def _flags(values: dict, prefix: str) -> Iterator[str]:
    for name, value in values.items():
        flag = f"{prefix}{name}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            yield f"--{flag}" if value else f"--{prefix.replace('_', '-')}no-{name.replace('_', '-')}"
        else:
            yield f"--{flag}"
            yield from map(str, value if isinstance(value, list) else [value])


def read_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe; a wrong name or value ends the program with the reason, as a wrong flag does."""
    import tyro

    return tyro.cli(Recipe, args=recipe_flags(path))


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every value, defaults too, so that the file alone repeats the run."""
    import json

    import yaml

    Path(path).write_text(yaml.safe_dump(json.loads(json.dumps(asdict(recipe))), sort_keys=False))
