"""Turn a verb's arguments into its options, and options into the commands of other verbs.

What comes in is a recipe, which may stand first, and flags that override it; what goes out is an instance of a class of
options and what of it was given, the help of a verb, or one line that says what is wrong.
"""

import contextlib
import inspect
import io
import itertools
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass, make_dataclass
from typing import Annotated, Any, NamedTuple, get_type_hints

import tyro
from pydantic import ValidationError

from dpace.config import Recipe, without_passwords
from dpace.recipes import RECIPES, VERBS
from dpace.recipes.recipe_file import read_settings
from dpace.system.ledger import JsonObject
from dpace.system.validation import UsageError, describe_invalid


class Arguments(NamedTuple):
    """What a verb reads from the command line."""

    options: type
    """A dataclass of options, some of which may be groups of options."""
    groups: Sequence[str] | None = None
    """Groups that the verb reads and that its help lists; by default all of them."""
    first: str | None = None
    """Option whose values may stand first, without a flag; for a `Recipe`, its file or name may."""


class Given(NamedTuple):
    """What the user wrote on the command line and in the recipe."""

    words: list[str]
    """The recipe and the flags by their full names, which all verbs that take a recipe know."""
    names: set[str]
    """Options that the recipe or a flag sets, such as `drafter.block_size`."""


def parse(reads: Arguments, verb: str, args: list[str]) -> tuple[Any, Given]:
    """Read a verb's options from a recipe, which may stand first, and flags that override it.

    The recipe is a YAML file, or the name of one that comes with dpace.

    Args:
        reads: what the verb reads.
        verb: of dpace.
        args: of the command line, after the verb.

    Returns:
        An instance of `Arguments.options`, and what of it was given.

    Raises:
        UsageError: an unknown flag, a flag whose value has another type, or an unknown name of a recipe.
        ValueError: a recipe that cannot be read, or a value outside its range.
        SystemExit: after `--help`.
    """
    config_class = reads.options
    if not {"-h", "--help", "--help-all"}.isdisjoint(args):
        known = _groups(config_class)
        shown = known if reads.groups is None or "--help-all" in args else reads.groups
        _print_help(config_class, verb, [name for name in known if name not in shown])
    if reads.first and args and not args[0].startswith("-"):
        args = [f"--{reads.first}", *args]
    words = _words(config_class, verb, args)
    recipe, settings, flags = _read(config_class, words)
    output = io.StringIO()
    try:
        # without a terminal, tyro draws in ASCII
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            options = tyro.cli(config_class, prog=f"dpace {verb}", args=flags, default=recipe)
    except (SystemExit, ValidationError) as end:
        raise _refusal(end, output.getvalue(), config_class, verb) from end
    return options, Given(words, _names(settings, flags))


def _groups(config_class: type) -> dict[str, type]:
    """Return the dataclass of each group of options, by name."""
    return {
        name: kind
        for name, kind in get_type_hints(config_class).items()
        if isinstance(kind, type) and is_dataclass(kind)
    }


def _print_help(config_class: type, verb: str, others: Sequence[str]) -> None:
    """Print the options of a verb, and a line for each group that it does not read.

    Raises:
        SystemExit: always.
    """
    kinds = _groups(config_class)
    hidden: Any = [(name, Annotated[kinds[name], tyro.conf.Suppress], kinds[name]()) for name in others]
    shown = make_dataclass(config_class.__name__, hidden, bases=(config_class,), frozen=True)
    width = shutil.get_terminal_size().columns
    paragraphs = inspect.cleandoc(config_class.__doc__ or "").split("\n\n")
    if config_class is Recipe:
        paragraphs[0] = f"{VERBS[verb].capitalize()}."
    for paragraph in paragraphs:
        print(textwrap.fill(paragraph, width), end="\n\n")
    recipe = " [RECIPE]" * issubclass(config_class, Recipe)
    with contextlib.suppress(SystemExit):
        tyro.cli(shown, prog=f"dpace {verb}{recipe}", description="", args=["--help"])
    if others:
        print("other options of recipes, which --help-all lists:")
        for name in others:
            line = f"  --{name + '.*':<11} {kinds[name].__doc__}"
            print(textwrap.fill(line, width, subsequent_indent=" " * 16))
    if verb in kinds:
        print(f"--{verb}.NAME may be written as --NAME.")
    raise SystemExit(0)


def _words(config_class: type, verb: str, args: list[str]) -> list[str]:
    """Return the arguments, the flags among them with their full names."""
    names = get_type_hints(config_class)
    groups = _groups(config_class)
    own = get_type_hints(groups[verb]).keys() - names.keys() if verb in groups else ()
    return [
        f"--{verb}.{arg.removeprefix('--')}" if arg.startswith("--") and _option_of(arg) in own else arg for arg in args
    ]


def flags_of(config_class: type, verb: str) -> str:
    """Return in one line the flags that `--help-all` lists, and those that are short for ones of the verb's group."""
    groups = _groups(config_class)
    names = set(get_type_hints(config_class)) - groups.keys()
    for group, options in groups.items():
        inner = get_type_hints(options)
        names |= {f"{group}.{name}" for name in inner}
        if group == verb:
            names |= inner.keys()
    return " ".join(sorted(f"--{name.replace('_', '-')}" for name in names))


def _read(config_class: type, words: list[str]) -> tuple[Any, JsonObject, list[str]]:
    """Read the recipe that stands first, if one does; return it, its settings, and the flags."""
    if not words or words[0].startswith("-") or not issubclass(config_class, Recipe):
        return tyro.MISSING_NONPROP, {}, words
    path, *flags = words
    if not path.endswith((".yaml", ".yml")):
        if path not in RECIPES:
            raise UsageError(f"there is no recipe named {path!r}; name a YAML file, or one of {', '.join(RECIPES)}")
        path = str(RECIPES[path])
    recipe, settings = read_settings(path, config_class)
    return recipe, settings, flags


def _option_of(flag: str) -> str:
    """Return the option that a flag sets: `train.torch_compile` of --train.no-torch-compile."""
    group, dot, name = flag.removeprefix("--").partition("=")[0].rpartition(".")
    return f"{group}{dot}{name.removeprefix('no-')}".replace("-", "_")


def _refusal(end: BaseException, output: str, config_class: type, verb: str) -> ValueError:
    """Return in one line why tyro ended.

    Args:
        end: how it did; it handled or raised an error of pydantic where a value of the right type is refused.
        output: what it printed.
        config_class: the options.
        verb: of dpace.
    """
    error: BaseException | None = end
    while error and not isinstance(error, ValidationError):
        error = error.__context__
    if not error:
        return UsageError(_one_line(output, verb))
    group, kind = next(
        ((f"{n}.", k) for n, k in _groups(config_class).items() if k.__name__ == error.title), ("", config_class)
    )
    name, reason = describe_invalid(error, kind).split(" ", 1)
    flag = f"--{group}{name.partition('[')[0]}".replace("_", "-")
    return ValueError(f"{flag} {reason}; change it, or leave it out for the default")


def _one_line(output: str, verb: str) -> str:
    """Shorten tyro's box to what is wrong and the option that may have been meant."""
    lines = [line.strip("| ") for line in output.splitlines()][2:]  # without the title
    problem = " ".join(itertools.takewhile(lambda line: line.strip("-"), lines)).removesuffix(".")
    meant = next((line.split()[0] for line in lines if line.startswith("--") and line.strip("-")), "")
    hint = f"did you mean {meant}? " if meant and meant not in problem else ""
    return f"{problem or 'the flags cannot be read'}; {hint}`dpace {verb} --help` lists the options"


def _names(settings: JsonObject, flags: list[str]) -> set[str]:
    """Return the names of the options that a recipe's settings or flags set."""
    given = {_option_of(flag) for flag in flags if flag.startswith("--")}
    for name, value in settings.items():
        given |= {f"{name}.{each}" for each in value} if isinstance(value, dict) else {name}
    return given


def command(verb: str, *values: object, **flags: object) -> str:
    """Return a command to copy into a shell, without the passwords of addresses.

    Args:
        verb: of dpace.
        values: what stands before the flags.
        flags: by name; True stands for the flag alone, None and False leave it out.
    """
    words = ["dpace", verb, *map(str, values)]
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(without_passwords(words))
