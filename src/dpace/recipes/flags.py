"""Turn recipes and command-line flags into configs, and configs into recipes and commands."""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dpace.config import Recipe
from dpace.recipes import RECIPES
from dpace.recipes.ranges import check_ranges
from dpace.recipes.validation import UsageError
from dpace.system.ledger import write_text

RECIPE_ENDS = (".yaml", ".yml")
PROMPT = "Why is the sky blue?"
"""The prompt of commands that are shown to be copied."""


def parse(config_class, verb: str, args: list[str]):
    """Read a verb's options from a recipe, which may stand first, and flags that override it.

    The recipe is a YAML file, or the name of one that comes with dpace.

    Raises:
        UsageError: an unknown flag, a value of another type, or an unknown name of a recipe.
        ValueError: a recipe that cannot be read, or a value outside its range.
    """
    recipe, path = [], _recipe_path(args, config_class)
    if path is not None:
        recipe, args = recipe_flags(path, config_class), args[1:]
    own = [_with_group(config_class, verb, arg) for arg in args]
    return _read_flags(config_class, [*recipe, *own], verb)


def _recipe_path(args: list[str], config_class: type) -> str | Path | None:
    """Find the recipe that stands first; None where flags begin at once."""
    if not args or args[0].startswith("-"):
        return None
    if args[0].endswith(RECIPE_ENDS):
        return args[0]
    if not issubclass(config_class, Recipe):
        return None
    if args[0] not in RECIPES:
        raise UsageError(f"there is no recipe named {args[0]!r}; name a YAML file, or one of {', '.join(RECIPES)}")
    return RECIPES[args[0]]


def _read_flags(config_class, args: list[str], verb: str):
    """Read flags, and say in one line what is wrong with them."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide({"-h", "--help"}.isdisjoint(args)):
            config = tyro.cli(config_class, prog=f"dpace {verb}".strip(), args=args)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UsageError(_one_line(said.getvalue(), verb, config_class)) from end
    check_ranges(config)
    return config


@contextlib.contextmanager
def _wide(is_wide: bool) -> Iterator[None]:
    """Keep tyro from breaking words at the width of the terminal."""
    before = os.environ.get("COLUMNS")
    if is_wide:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if is_wide:
            os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(said: str, verb: str, config_class: type) -> str:
    """Shorten tyro's box to what is wrong and the option that may have been meant."""
    sections: list[list[str]] = [[]]
    for line in said.splitlines():
        if line.startswith(("╭", "╰")) or not line.strip("│|─- "):  # a border or a rule, in Unicode or ASCII
            sections.append([])
        else:
            sections[-1].append(line.strip("│| "))
    found = [section for section in sections if section]
    if "╭" not in said:  # there the title is a section
        found = found[1:]
    words = " ".join(found[0]).removesuffix(".") if found else "the flags cannot be read"
    meant = next((line.split()[0] for section in found[1:] for line in section if line.startswith("--")), "")
    meant = _abbreviated(words, verb, config_class) or meant
    hint = f"did you mean {meant}? " if meant and meant not in words else ""
    return f"{words}; {hint}`dpace {verb} --help` lists the options"


def _abbreviated(words: str, verb: str, config_class: type) -> str:
    """Find the option whose initials an unknown one has, such as --lr; empty where there is none."""
    unknown = re.match(r"Unrecognized options: --(?:([\w-]+)\.)?([a-z]+)\b", words)
    if not unknown:
        return ""
    paths = [path.rpartition(".") for path in _option_names(config_class)]
    paths.sort(key=lambda path: path[0] != (unknown[1] or verb))
    fits = (f"--{group}{dot}{name}" for group, dot, name in paths if _initials(name) == unknown[2])
    return next(fits, "")


def _initials(name: str) -> str:
    """Give the first letters of an option's words."""
    return "".join(word[0] for word in name.split("-"))


def _option_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yield the names of all options as flags have them, those of groups behind the group's name."""
    for name, kind in get_type_hints(config_class).items():
        path = f"{prefix}{name}".replace("_", "-")
        yield from _option_names(kind, f"{path}.") if is_dataclass(kind) and isinstance(kind, type) else [path]


def _with_group(config_class, verb: str, arg: str) -> str:
    """Add a verb's own group where a flag leaves it out: `dpace bench --sets` means `--bench.sets`."""
    groups: dict[str, Any] = {field.name: field.default_factory for field in fields(config_class)}
    name = arg.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    if not arg.startswith("--") or name in groups or verb not in groups:
        return arg
    is_own = name in {field.name for field in fields(groups[verb])}
    prefix = f"--{verb}.no-" if arg.startswith("--no-") else f"--{verb}."
    return prefix + arg.removeprefix("--").removeprefix("no-") if is_own else arg


def given_options(config_class, verb: str, args: list[str]) -> set[str]:
    """Name the options that a recipe or a flag sets, such as `drafter.block_size`.

    Its arguments are those of `parse`.
    """
    path = _recipe_path(args, config_class)
    flags = recipe_flags(path, config_class) if path is not None else []
    flags += [_with_group(config_class, verb, arg) for arg in args[path is not None :]]
    return {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}


def first_as(name: str, args: list[str]) -> list[str]:
    """Let values that stand first be those of a flag."""
    return [f"--{name}", *args] if args and not args[0].startswith("-") else args


def command(verb: str, *values: Any, **flags: Any) -> str:
    """Give a command to copy into a shell.

    Args:
        verb: of dpace.
        values: what stands before the flags.
        flags: by name; True stands for the flag alone, None and False leave it out.
    """
    words = ["dpace", verb, *(without_password(str(value)) for value in values)]
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [without_password(str(value))])]
    return shlex.join(words)


def without_password(text: str) -> str:
    """Leave user and password out of an address; other texts stay."""
    return re.sub(r"^(https?://)[^/]*@", r"\1", text)


def next_command(verb: str, recipe: Recipe, args: list[str]) -> str:
    """Give the command that runs another verb with the same settings.

    It names the recipe file that was given, and each setting that differs from that file by its full name, which all
    verbs that take a recipe know.

    Args:
        verb: that takes a recipe: respond, train or bench.
        recipe: the settings of this run.
        args: the arguments that they were parsed from.
    """
    path = _recipe_path(args, Recipe)
    base = read_recipe(path) if path else Recipe()
    return command(verb, *(args[:1] if path else []), *_flags(_changes(asdict(recipe), asdict(base)), ""))


def _changes(values: dict, base: dict) -> dict:
    """Keep the settings that differ from `base`, group by group."""
    changed = {name: _changes(value, base[name]) for name, value in values.items() if isinstance(value, dict)}
    changed |= {name: value for name, value in values.items() if name not in changed and value != base[name]}
    return {name: value for name, value in changed.items() if value != {}}


def recipe_flags(path: str | Path, config_class: type = Recipe) -> list[str]:
    """Turn a YAML recipe into the flags that it stands for, `--group.name value`.

    Raises:
        ValueError: see `dpace.recipes.recipe_file.read_settings`.
    """
    from dpace.recipes.recipe_file import read_settings

    return list(_flags(read_settings(path, config_class), ""))


def _flags(values: dict, prefix: str) -> Iterator[str]:
    """Yield the flags and values of nested settings."""
    for name, value in values.items():
        flag = f"{prefix}{name}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            yield f"--{flag}" if value else f"--{prefix.replace('_', '-')}no-{name.replace('_', '-')}"
        elif isinstance(value, str) and value.startswith("-"):
            yield f"--{flag}={value}"
        else:
            yield f"--{flag}"
            yield from map(str, value if isinstance(value, list | tuple) else [value])


def read_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        ValueError: the file, the key and the value of what is wrong.
    """
    return _read_flags(Recipe, recipe_flags(path), "")


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every value, defaults too, so that the file alone repeats the run; passwords are left out."""
    import json

    from dpace.recipes.recipe_file import dump_settings

    write_text(path, dump_settings(_without_passwords(json.loads(json.dumps(asdict(recipe))))))


def _without_passwords(value: Any) -> Any:
    """Leave passwords out of all addresses in nested settings."""
    if isinstance(value, dict):
        return {name: _without_passwords(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_passwords(item) for item in value]
    return without_password(value) if isinstance(value, str) else value
