"""Write files all or nothing, keep others out while writing, and leave alone what dpace did not write."""

import contextlib
import errno
import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from dpace.system import ranks
from dpace.system.progress import quoted

JsonObject = dict[str, Any]
"""An object of a JSON file or message, or of a config; its values are checked where they are read."""

MARKER = ".dpace.json"
"""In each folder that dpace writes to: the names of the files that it wrote."""
LOCK = ".dpace.lock"
"""The lock of a folder that a process writes to."""
UNFINISHED = ".unfinished"
"""How the names of files and folders end that are not written to their end; they begin with a dot."""
FULL_DISK = rf"os error (27|28|122)|Errno ({errno.ENOSPC}|{errno.EDQUOT})\b|\d+ requested and \d+ written"
"""What safetensors, Python and numpy say where there is no room, or no more of a quota."""


def read_text(path: str | Path, what: str) -> str:
    """Read a file in UTF-8.

    Args:
        path: of a regular file: devices and pipes may have no end.
        what: what the file should be, for the message, such as "a YAML file of options".

    Raises:
        ValueError: the file is missing, is none, or is not in UTF-8.
    """
    with _reading(path, what):
        return Path(path).read_bytes().decode("utf-8-sig")  # without the mark that editors on Windows write first


def read_object(path: Path, fix: str, kind: type = dict) -> Any:
    """Read a file that holds one JSON object, or a value of another kind.

    Raises:
        ValueError: it cannot be read, or is none of this kind.
    """
    text = read_text(path, "a JSON file")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {fix}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds {type(value).__name__}, expected {kind.__name__}; {fix}")
    return value


def read_jsonl(path: str | Path, *, is_growing: bool = False) -> Iterator[tuple[int, dict]]:
    """Yield the number and the object of each line that is not blank.

    A line ends with a line feed only: other characters that Unicode calls line ends may stand in a text.

    Args:
        path: a regular file.
        is_growing: leave out a last line that its writer has not finished.

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object.
    """
    with _reading(path, "a JSONL file"), Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # undecodable, no JSON, an endless number, a deep list
                if is_growing and not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}:{number}: the line is not JSON ({error}); fix or remove it") from error
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise ValueError(f"{path}:{number}: expected a JSON object, found {kind}; fix or remove the line")
            yield number, row


def refuse_endless(path: str | Path, what: str) -> None:
    """Refuse what is no regular file, such as a pipe that nobody writes to; a missing one is left to the reader.

    Raises:
        ValueError: names the path, and `what` it should be.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"cannot read {path}: it is a folder, a device or a pipe; name {what}")


@contextlib.contextmanager
def _reading(path: str | Path, what: str) -> Iterator[None]:
    """Refuse what may have no end, and say in one line why a file cannot be read."""
    refuse_endless(path, what)
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:  # without number and path
            reason = error.strerror
        raise ValueError(f"cannot read {path}: {reason}; name {what} in UTF-8") from error


@contextlib.contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Let errors inside the `with` block name this file: one of a full disk, and an OSError that names none.

    A library may have words of its own for a full disk or quota.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if re.search(FULL_DISK, str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if isinstance(error, OSError) and error.errno:
            is_unfinished = str(error.filename).endswith(UNFINISHED)  # a name that the user does not know
            if is_unfinished or not error.filename:
                error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file all or nothing; a file that holds this text already is left alone."""
    path = Path(path)
    data = text.encode("utf-8")
    if path.is_file() and path.read_bytes() == data:
        return
    with writing(path) as unfinished:
        unfinished.write_bytes(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what is there at the end of the `with` block takes the file's place.

    A full disk or a killed process leaves the file as it was before. The path is this process's own, and `lock_folder`
    removes it after a kill.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with naming_file(path):
            yield unfinished
            sync(unfinished)  # else a power cut may leave the new name with none of the content
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, all or nothing.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sync(path: str | Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk and not only on its way."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed processes left unfinished in a folder.

    `lock_folder` does so; in folders inside the held one call it yourself.
    """
    for path in Path(folder).glob(f".*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_link(path: Path) -> None:
    """Refuse a link in a folder that is written to, also a dead one: what it names lies elsewhere; and a pipe.

    Raises:
        ValueError: names the path.
    """
    if path.is_symlink() or path.is_fifo():
        raise ValueError(
            f"{path} is a link or a pipe, and dpace writes to files and folders of its own only; move it away, or name "
            "another folder with --output"
        )


def append_lines(path: Path, rows: Iterable[JsonObject]) -> None:
    """Add lines of JSON to a file, and wait for the disk: a kill from here on loses none. Make the file if needed.

    Raises:
        ValueError: it is a link, dead or not, or a pipe.
        OSError: it cannot be written to; names it.
    """
    refuse_link(path)
    with naming_file(path), path.open("a", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_unfinished_line(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished; see `refuse_link`."""
    refuse_link(path)
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)  # to nothing, where no line has an end


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Keep other processes from writing to a folder inside the `with` block; make the folder.

    What killed processes left unfinished there is removed; their locks are gone. A process may lock a folder twice. Of
    several ranks the first one locks it for all.

    Raises:
        ValueError: another process has locked the folder.
        OSError: the file system has no locks, such as NFS without a lock server.
    """
    if not ranks.is_first():
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # One object a path in this process, so that a verb may lock the folder that its caller has locked.
    lock = filelock.FileLock(folder / LOCK, is_singleton=True)
    try:
        with naming_file(folder / LOCK):
            lock.acquire(timeout=0.0)
    except filelock.Timeout as error:
        raise ValueError(
            f"another process is writing to {folder}; wait for it, end it, or name another folder with --output"
        ) from error
    try:
        if lock.lock_counter == 1:
            remove_unfinished(folder)
        yield
    finally:
        lock.release()


def refuse_foreign_files(folder: str | Path, *names: str) -> set[str]:
    """Refuse to write over files that dpace did not write, and return the names of those that it wrote.

    Raises:
        ValueError: one of the names exists and was not written by dpace, or is a link, see `refuse_link`; or the
            marker has other than plain names.
    """
    folder = Path(folder)
    written = _read_marker(folder / MARKER)
    for name in names:
        refuse_link(folder / name)
        if (folder / name).exists() and name not in written:
            raise ValueError(
                f"{folder / name} was not written by dpace and would be overwritten; name another folder with "
                f"--output, move that file away, or copy {MARKER} too where it comes from another folder of dpace"
            )
    return written


def _read_marker(path: Path) -> set[str]:
    """Read the names of the files that dpace wrote to a folder; they are removed, and so must lie in it."""
    if not path.exists():
        return set()
    fix = "remove it, and what dpace wrote beside it"
    names = read_object(path, fix).get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{path}: files is {quoted(names)}, expected names of files of this folder; {fix}")
    return set(names)


def register_files(folder: str | Path, *names: str) -> None:
    """Note that dpace writes these files of a folder, and refuse to write over others; make the folder.

    Raises:
        ValueError: one of them exists and was not written by dpace.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = refuse_foreign_files(folder, *names)
    if not written.issuperset(names):
        write_json(folder / MARKER, {"files": sorted(written | set(names))})


def remove_files(folder: str | Path, patterns: Collection[str], *, keep: Collection[str]) -> list[str]:
    """Remove what dpace wrote to a folder, by patterns of names, but for the names to keep; return what was removed.

    What another program wrote stays, whatever its name. Call it inside `lock_folder`.
    """
    folder = Path(folder)
    written = _read_marker(folder / MARKER)
    removed = []
    for name in sorted(written.difference(keep)):
        is_like = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        if is_like and (folder / name).is_file():
            (folder / name).unlink()
            removed.append(name)
    write_json(folder / MARKER, {"files": sorted(written.difference(removed))})
    return removed


def rank_file(path: Path, rank: int) -> Path:
    """Return the file that a rank adds lines to: the given one, or with several ranks one beside it."""
    return path if ranks.num_ranks() == 1 else path.with_stem(f"{path.stem}.rank-{rank}")


def find_rank_files(path: Path) -> list[Path]:
    """Find the files of ranks beside a file, this command's and those that killed ones left; the marker names them.

    Call it on the first rank before any rank writes: it registers those of this command.

    Raises:
        ValueError: see `register_files`.
    """
    names = {rank_file(path, rank).name for rank in range(ranks.num_ranks())}
    register_files(path.parent, *names.difference([path.name]))
    left = fnmatch.filter(_read_marker(path.parent / MARKER), f"{path.stem}.rank-*{path.suffix}")
    return [path.with_name(name) for name in sorted(left) if os.path.lexists(path.with_name(name))]


@contextlib.contextmanager
def filling(folder: str | Path, *, last: str = "config.json") -> Iterator[Path]:
    """Yield an empty folder, whose files move into `folder` at the end of the `with` block.

    Files that belong together are written so: aside, then onto the disk, then into place. Where the block fails, the
    old files stay. A process that is killed leaves the old files, the new ones, or, while they are exchanged, no file
    `last`, without which nothing reads the folder. The same call then writes it whole.

    Args:
        folder: made where it is missing.
        last: name of the file that makes the folder valid. Where it is among the new ones, the old one is removed
            first, and the new one is moved last.

    Raises:
        OSError: there is no room, also where a library says so in words of its own; names the outermost folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with naming_file(folder), tempfile.TemporaryDirectory(prefix=".", suffix=UNFINISHED, dir=folder) as aside:
            yield Path(aside)
            # True sorts after False: `last` stands at the end.
            files = sorted(Path(aside).iterdir(), key=lambda file: (file.name == last, file.name))
            mask = os.umask(0)  # it can only be read by setting another one
            os.umask(mask)
            for file in files:
                file.chmod(0o666 & ~mask)  # some libraries write for the owner alone
                sync(file)
            if files[-1].name == last:
                (folder / last).unlink(missing_ok=True)
            for file in files:
                file.replace(folder / file.name)
            sync(folder)  # the names too are on the disk now
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing is in it
        raise
