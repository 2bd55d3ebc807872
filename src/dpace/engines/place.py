"""Write the files of a folder aside, and move them into place when they have been compared."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dpace.ledger import HOLDER, LOCK, UNFINISHED, claim, hold, refuse_others

IDENTIFYING = ("config.json", "README.md", "model.safetensors")
"""Files that say whose a folder is: where another program wrote them, dpace writes nothing beside them."""
MODE = 0o644
"""Everyone may read what is exported: servers run as other users."""


def check_place(output: Path, *others: tuple[str, Path]) -> None:
    """Refuse a folder that is not dpace's to write to.

    Args:
        output: the folder; it may be missing.
        others: what is read, with its place.

    Raises:
        ValueError: the output is one of these places, or holds another program's files.
    """
    for what, place in others:
        if place.exists() and output.resolve() == place.resolve():
            raise ValueError(f"the output {output} is {what}; name another folder with --output")
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file; name a folder with --output")
    refuse_others(output, *IDENTIFYING)


@contextlib.contextmanager
def fill(output: Path) -> Iterator[Path]:
    """Yield an empty folder, whose files take their place in `output` at the end of the `with` block.

    Where the block fails, nothing is left behind. A killed process leaves the old files or the new ones: while they
    are exchanged, there is no `config.json`, without which no engine reads the folder.

    Raises:
        ValueError: files of another program would be overwritten, or another process writes there.
    """
    existed = output.exists()
    try:
        with hold(output), tempfile.TemporaryDirectory(prefix=".", suffix=UNFINISHED, dir=output) as aside:
            yield Path(aside)
            _move(Path(aside), output)
    except BaseException:
        _leave_nothing(output, existed)
        raise


def _move(aside: Path, output: Path) -> None:
    """Move all files, the config last."""
    files = sorted(aside.iterdir(), key=lambda file: file.name == "config.json")
    for file in files:
        file.chmod(MODE)
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    claim(output, *(file.name for file in files))
    if files and files[-1].name == "config.json":
        (output / "config.json").unlink(missing_ok=True)
    for file in files:
        file.replace(output / file.name)


def _leave_nothing(output: Path, existed: bool) -> None:
    """Remove what `hold` made, where there is nothing else."""
    if existed or not output.is_dir():
        return
    if {file.name for file in output.iterdir()} <= {LOCK, HOLDER}:
        shutil.rmtree(output, ignore_errors=True)
