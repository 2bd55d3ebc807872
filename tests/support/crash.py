"""Kill a run in this process at any of its file operations, as a power cut would.

A file operation is a call that changes the disk: a file opened for writing, lines added to one, a rename, a removal, a
new folder, an fsync, a safetensors file. After the kill no such call does anything any more, so that what `finally`
blocks would clean up stays where it is.
"""

import builtins
import errno
import gc
import io
import itertools
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch

GROWING = ("open", "append", "save", "fsync", "mkdir")
"""Operations that a full disk refuses."""


class Killed(BaseException):
    """What nothing catches."""


class Disk:
    """Counts the file operations under a folder, and kills the run at one of them.

    Args:
        folder: other files do not count.
        kill_at: number of the operation that does not happen any more; None for an undisturbed run.
        is_torn: leave half of a file where the operation writes or flushes one.
        is_full: the run goes on, but from that operation on there is no room; renames and removals need none.
    """

    def __init__(self, folder: Path, kill_at: int | None = None, *, is_torn: bool = False, is_full: bool = False):
        self.folder, self.kill_at, self.is_torn, self.is_full = str(folder), kill_at, is_torn, is_full
        self.operations: list[str] = []
        self.is_dead = False

    def happens(self, name: str, path, *, tear: Callable[[], object] | None = None) -> None:
        """Count an operation, or end the run."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if not os.path.abspath(path).startswith(self.folder) or path.endswith(".dpace.lock"):
            return
        if self.is_dead:
            raise Killed
        self.operations.append(f"{name} {os.path.relpath(path, self.folder)}")
        if self.is_full:
            if len(self.operations) > (self.kill_at or 0) and name in GROWING:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return
        if len(self.operations) - 1 == self.kill_at:
            self.is_dead = True
            if self.is_torn and tear is not None:
                tear()
            raise Killed

    @contextmanager
    def watching(self):
        """Count inside the `with` block."""
        real = {
            name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync")
        }
        real_open, real_save = io.open, safetensors.torch.serialize_file

        def changing(name):
            def call(path, *args, **kwargs):
                tear = (lambda: _halve(path)) if name == "fsync" else None
                self.happens(name, path, tear=tear)
                return real[name](path, *args, **kwargs)

            return call

        def opening(path, mode="r", *args, **kwargs):
            if not isinstance(path, str | os.PathLike) or not set(mode) & set("wax+"):
                return real_open(path, mode, *args, **kwargs)
            self.happens("open", path, tear=lambda: real_open(path, mode, *args, **kwargs).close())
            file = real_open(path, mode, *args, **kwargs)
            return self._appending(file, path) if "a" in mode else file

        def saving(tensors, path, **kwargs):
            self.happens("save", path, tear=lambda: (real_save(tensors, path, **kwargs), _halve(path)))
            return real_save(tensors, path, **kwargs)

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(time, "perf_counter", _Ticks()))
            for name in real:
                patches.enter_context(mock.patch.object(os, name, changing(name)))
            patches.enter_context(mock.patch.object(io, "open", opening))
            patches.enter_context(mock.patch.object(builtins, "open", opening))
            patches.enter_context(mock.patch.object(safetensors.torch, "serialize_file", saving))
            patches.enter_context(mock.patch.object(shutil, "_use_fd_functions", False))  # paths, not descriptors
            yield self

    def _appending(self, file, path):
        """Let the end of adding be an operation: a kill loses what is not flushed, or half of all that is new."""
        size, close = os.path.getsize(path), file.close

        def tear():
            close()
            os.truncate(path, size + (os.path.getsize(path) - size) // 2)

        def closing():
            if file.closed:
                return
            try:
                self.happens("append", path, tear=tear)
            except (Killed, OSError):
                getattr(file, "buffer", file).raw.close()  # drops what is not flushed
                raise
            close()

        file.close = closing
        return file


class _Ticks:
    """A clock on which everything takes as long, so that results hold the same seconds in every run."""

    def __init__(self):
        self.ticks = itertools.count()

    def __call__(self) -> float:
        return next(self.ticks) / 1024


def _halve(path) -> None:
    """Cut a file in half; a folder stays."""
    name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
    if os.path.isfile(name):
        os.truncate(name, os.path.getsize(name) // 2)


def operations_of(run: Callable[[], object], folder: Path) -> list[str]:
    """Run undisturbed and name its file operations."""
    disk = Disk(folder)
    with disk.watching():
        run()
    return disk.operations


def kill(run: Callable[[], object], folder: Path, at: int, *, is_torn: bool = False) -> str:
    """Run and die at an operation; say which it was."""
    disk = Disk(folder, at, is_torn=is_torn)
    of_no_process = mock.patch.object(os, "getpid", lambda: 2**22 + 1)  # and not of the next
    with pytest.raises(Killed), disk.watching(), of_no_process:
        run()
    gc.collect()  # a dead process holds no lock
    return disk.operations[-1]


def fill(run: Callable[[], object], folder: Path, at: int) -> str:
    """Run and have no room from an operation on; say which that was. The run must say so in one line."""
    disk, said = Disk(folder, at, is_full=True), None
    with disk.watching():
        try:
            run()
        except (OSError, ValueError) as error:
            said = str(error)
    needs_room = any(what.startswith(GROWING) for what in disk.operations[at:])
    assert (said is not None) == needs_room, disk.operations[at:]
    assert said is None or ("No space left on device" in said and "\n" not in said), said
    return disk.operations[at]
