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
from collections.abc import Collection, Sequence
from dataclasses import is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import tyro
from pydantic import ValidationError

from dpace.config import Recipe
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
    """Option whose values may stand first, or the only one last; for a `Recipe`, its file or name may stand first."""


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
        hidden: set[str] = set()
        if reads.groups is not None and "--help-all" not in args:
            hidden = _groups(config_class).keys() - set(reads.groups)
        _print_help(config_class, verb, hidden)
    if reads.first and args:
        if not args[0].startswith("-"):
            args = [f"--{reads.first}", *args]
        elif not args[-1].startswith("-"):
            kind = get_type_hints(config_class).get(_option_of(args[-2]))
            # The word before is no flag that takes the last one as its value.
            if kind in (None, bool) or "=" in args[-2]:
                args = [*args[:-1], f"--{reads.first}", args[-1]]
    words = _with_full_names(config_class, verb, args)
    recipe, settings, flags = _read_recipe(config_class, words)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            options = tyro.cli(config_class, prog=f"dpace {verb}", args=flags, default=recipe)
    except (SystemExit, ValidationError) as end:
        raise _refusal(end, output.getvalue(), config_class, verb) from end
    return options, Given(words, _given_names(settings, flags))


def _groups(config_class: type) -> dict[str, type]:
    """Return the dataclass of each group of options, by name."""
    groups = {}
    for name, kind in get_type_hints(config_class).items():
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = kind
    return groups


def _print_help(config_class: type, verb: str, hidden: Collection[str]) -> None:
    """Print the options of a verb, and a line for each group that it does not read.

    Raises:
        SystemExit: always.
    """
    groups = _groups(config_class)
    hidden_groups = {name: group for name, group in groups.items() if name in hidden}
    # A subclass whose fields tyro leaves out, since it takes no list of what to show.
    suppressed: Any = []
    for name, group in hidden_groups.items():
        suppressed.append((name, Annotated[group, tyro.conf.Suppress], group()))
    shown = make_dataclass(config_class.__name__, suppressed, bases=(config_class,), frozen=True)
    width = shutil.get_terminal_size().columns
    paragraphs = inspect.cleandoc(config_class.__doc__ or "").split("\n\n")
    if config_class is Recipe:
        paragraphs[0] = f"{VERBS[verb].capitalize()}."
    for paragraph in paragraphs:
        print(textwrap.fill(paragraph, width), end="\n\n")
    prog = f"dpace {verb}"
    if issubclass(config_class, Recipe):
        prog += " [RECIPE]"
    with contextlib.suppress(SystemExit):
        tyro.cli(shown, prog=prog, description="", args=["--help"])
    if hidden_groups:
        print("other options of recipes, which --help-all lists:")
        for name, group in hidden_groups.items():
            line = f"  --{name + '.*':<11} {group.__doc__}"
            print(textwrap.fill(line, width, subsequent_indent=" " * 16))
    if verb in groups:
        print(f"--{verb}.NAME may be written as --NAME.")
    raise SystemExit(0)


def _with_full_names(config_class: type, verb: str, args: list[str]) -> list[str]:
    """Return the arguments, the flags among them with their full names: --train.seed for --seed of `dpace train`."""
    groups = _groups(config_class)
    if verb not in groups:
        return args
    # A name that the recipe itself has, too, stays the recipe's.
    short_names = get_type_hints(groups[verb]).keys() - get_type_hints(config_class).keys()
    words = []
    for arg in args:
        if arg.startswith("--") and _option_of(arg) in short_names:
            arg = f"--{verb}.{arg.removeprefix('--')}"
        words.append(arg)
    return words


def _read_recipe(config_class: type, words: list[str]) -> tuple[Any, JsonObject, list[str]]:
    """Read the recipe that stands first, if one does; return it, its settings, and the flags."""
    if not words or words[0].startswith("-") or not issubclass(config_class, Recipe):
        return tyro.MISSING_NONPROP, {}, words
    path, *flags = words
    file = RECIPES.get(path, Path(path))
    if not file.exists():
        raise UsageError(f"there is no recipe named {path!r}; name a YAML file, or one of {', '.join(RECIPES)}")
    return *read_settings(file, config_class), flags


def _option_of(flag: str) -> str:
    """Return the option that a flag sets: `train.torch_compile` of --train.no-torch-compile."""
    group, dot, name = flag.removeprefix("--").partition("=")[0].rpartition(".")
    return f"{group}{dot}{name.removeprefix('no-')}".replace("-", "_")


def _flag_of(option: str) -> str:
    """Return the flag of an option: --train.torch-compile of `train.torch_compile`."""
    return f"--{option}".replace("_", "-")


def _refusal(end: BaseException, output: str, config_class: type, verb: str) -> ValueError:
    """Return in one line why tyro ended.

    Args:
        end: how it did; it handled or raised an error of pydantic where a value of the right type is refused.
        output: what it printed.
        config_class: the options.
        verb: of dpace.
    """
    # tyro exits while it handles the error, which is then the context of the exit, or one further.
    error: BaseException | None = end
    while error and not isinstance(error, ValidationError):
        error = error.__context__
    if not error:
        return UsageError(_problem_of(output, verb))
    kind = config_class
    prefix = ""
    for name, group in _groups(config_class).items():
        if group.__name__ == error.title:  # pydantic names the class alone
            kind = group
            prefix = f"{name}."
    name, reason = describe_invalid(error, kind).split(" ", 1)
    flag = _flag_of(prefix + name.partition("[")[0])  # an entry of a list has no flag of its own
    return ValueError(f"{flag} {reason}; change it, or leave it out for the default")


def _problem_of(output: str, verb: str) -> str:
    """Shorten tyro's box to what is wrong and the option that may have been meant.

    tyro has no public way to give errors as data: its hook, `tyro._errors`, is private and "may change in any release".
    Without a terminal it draws in ASCII: a title between two lines, what is wrong, a line of hyphens, and then options
    with their help.
    """
    lines = [line.strip("| ") for line in output.splitlines()][2:]
    texts = [line.strip("-") and line for line in lines]  # one that is drawn with hyphens is empty
    problem = " ".join(itertools.takewhile(bool, texts)).removesuffix(".")
    options = [text.split()[0] for text in texts if text.startswith("--")]
    hint = ""
    if options and options[0] not in problem:  # else it is the option whose value is wrong
        hint = f"did you mean {options[0]}? "
    return f"{problem or 'the flags cannot be read'}; {hint}`dpace {verb} --help` lists the options"


def _given_names(settings: JsonObject, flags: list[str]) -> set[str]:
    """Return the names of the options that a recipe's settings or flags set."""
    names = {_option_of(flag) for flag in flags if flag.startswith("--")}
    for group, value in settings.items():
        if isinstance(value, dict):
            names |= {f"{group}.{name}" for name in value}
        else:  # an option outside of groups
            names.add(group)
    return names


def command(verb: str, *values: object, **flags: object) -> str:
    """Return a command to copy into a shell.

    Args:
        verb: of dpace.
        values: what stands before the flags.
        flags: by name; True stands for the flag alone, None and False leave it out.
    """
    words = ["dpace", verb, *map(str, values)]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(_flag_of(name))
        if value is not True:
            words.append(str(value))
    return shlex.join(words)
