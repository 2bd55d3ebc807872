"""Counts the bytes of tensors that are alive at once."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The largest sum of the storages that operations inside it made and that were alive together, in `bytes`."""

    def __init__(self):
        super().__init__()
        self.bytes, self.now, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage(), before)
        return out

    def _add(self, storage, before) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or id(storage) in before:
            return
        self.known.add(key)
        self.now += size
        self.bytes = max(self.bytes, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size) -> None:
        self.known.discard(key)
        self.now -= size
