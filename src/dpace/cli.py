"""The command line: `dpace VERB [recipe.yaml] [--group.field value]`; a recipe where the verb reads one."""

import difflib
import errno
import importlib
import io
import os
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import dpace
from dpace.recipes import MAIN_VERBS, OF_FOLDERS, OF_RECIPES, RECIPES, VERBS
from dpace.system import ranks


def _list_verbs(verbs: Iterable[str]) -> str:
    """Write a line for each verb."""
    return "\n".join(f"  {verb:<9} {VERBS[verb]}" for verb in verbs)


RECIPE_LINES = textwrap.fill(
    f"These take a recipe before the options, which override it: {', '.join(OF_RECIPES)}. A recipe is a YAML file of "
    f"options, or the name of one that dpace has: {', '.join(RECIPES)}.",
    80,
    break_on_hyphens=False,
)
USAGE = f"""usage: dpace VERB [RECIPE or FOLDER] [--option value ...]

from prompts to a served drafter:
{_list_verbs(MAIN_VERBS)}

more verbs:
{_list_verbs(verb for verb in VERBS if verb not in MAIN_VERBS)}

{RECIPE_LINES}
To these, a folder may be given there: {", ".join(OF_FOLDERS)}.
`dpace VERB --help` lists the verb's options, `--help-all` those of all groups;
`dpace --version` prints the version.
"""
CONTINUING = ("demo", "prompts", "respond", "train", "compare", "bench")
"""Verbs that go on where they were interrupted."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    Returns:
        0 for success, 1 for a failure whose reason was printed, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM,
        141 where whoever read the output closed it.
    """
    if argv is None:
        argv = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that a terminal does not have becomes an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes at its end, and would fail again.
        with suppress(OSError, ValueError):  # the output is not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever reads the output has enough, as `head` has
            return 141
        error.filename = "the output"
        print(f"dpace: {_explain(error)}", file=sys.stderr)
        return 1
    return code


def _run(argv: list[str]) -> int:
    """Run a verb, or print what is asked of the command itself; give the exit code."""
    verb, *args = argv or [""]
    if verb not in VERBS:
        return _print_about(verb)
    # Libraries read these when they are imported, which only a verb does.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # bars of transformers and others fill a log
            os.environ.setdefault(name, "1")
    try:
        with _sigterm_as_interrupt():
            from dpace.recipes.flags import parse

            # `import` is a word of Python.
            file = importlib.import_module(f"dpace.verbs.{'import_' if verb == 'import' else verb}")
            file.run(*parse(file.ARGUMENTS, verb, args))
    except KeyboardInterrupt as error:
        return _end_interrupted(verb, error)
    except BrokenPipeError:  # an OSError, which is no failure here
        raise
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        return _end_failed(verb, error)
    return 0


def _print_about(word: str) -> int:
    """Print what a word says that is no verb; give the exit code."""
    if word == "--version":
        print(f"dpace {dpace.__version__}")
        return 0
    if word in ("-h", "--help"):
        print(USAGE)
        return 0
    if not word:
        print(USAGE, file=sys.stderr)
        return 2
    hint = ""
    for meant in difflib.get_close_matches(word, VERBS, n=1):
        hint = f"did you mean {meant}? "
    print(f"unknown verb {ascii(word)}; {hint}`dpace --help` lists the verbs", file=sys.stderr)
    return 2


def _end_interrupted(verb: str, error: KeyboardInterrupt) -> int:
    """Say how to go on after a signal; give the exit code."""
    if ranks.is_first():
        reason = "interrupted"
        if verb in CONTINUING:
            reason += "; what is on disk is kept: run the same command to continue"
        _print_reason(verb, reason)
    signal_number = error.args[0] if error.args else signal.SIGINT
    return 128 + signal_number


def _end_failed(verb: str, error: Exception) -> int:
    """Say why a verb failed; give the exit code.

    Raises:
        Exception: the error, where it is a bug of dpace, which the traceback shows.
    """
    reason = _explain(error)
    if reason is None:
        raise error
    _print_reason(verb, reason)
    from dpace.system.validation import UsageError

    return 2 if isinstance(error, UsageError) else 1


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_reason(verb: str, reason: str) -> None:
    """Print a reason in one line that cannot steer a terminal."""
    from dpace.system.progress import printable

    # Only line ends go: spaces may belong to a path.
    line = " ".join(part.strip() for part in reason.split("\n") if part.strip())
    print(f"dpace {verb}: {printable(line)}", file=sys.stderr)


def _explain(error: Exception) -> str | None:
    """Return what a user can do about an error; None where it is a bug of dpace."""
    if isinstance(error, OSError):
        if error.errno is None:  # of a library, in its own words
            return str(error)
        fix = "change this, or name another path"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "make room, and run the same command again: it goes on"
        return f"{error.filename or 'a file'}: {error.strerror}; {fix}"
    if isinstance(error, ValueError):
        return str(error)
    # torch's own, told by name and words: its class is not imported here, and a CPU's is a plain RuntimeError.
    is_short = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or is_short:
        return "out of memory; free some, or lower batch sizes, new tokens, --train.num-anchors or --loss.chunk-mib"
    if isinstance(error, ImportError) and not (error.name or "dpace").startswith("dpace"):
        return f"the package {error.name} is needed for this and is not installed: run `pip install {error.name}`"
    return None


if __name__ == "__main__":
    sys.exit(main())
