"""Versions, hardware and hashes that belong to a measured number."""

import hashlib
import json
import operator
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import dpace
from dpace.system import ranks
from dpace.system.device import device_name

FINGERPRINT_VALUES = 64
"""Values of each tensor that the fingerprint of weights reads."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine."""

    device: str
    cores: int | None
    torch_threads: int


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of the packages that decide about speed and text."""

    dpace: str
    torch: str
    transformers: str
    python: str


def find_versions() -> Versions:
    """Give the versions of what computes."""
    return Versions(
        dpace=dpace.__version__,
        torch=version("torch"),
        transformers=version("transformers"),
        python=platform.python_version(),
    )


def find_hardware(device: torch.device) -> Hardware:
    """Name the device, and count cores and threads."""
    return Hardware(device=device_name(device), cores=os.cpu_count(), torch_threads=torch.get_num_threads())


def hash_json(value: Any) -> str:
    """Hash a value that JSON can hold: sha256, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Tell weights from others: sha256 over the name, shape, dtype and some values of each tensor.

    At most `FINGERPRINT_VALUES` values of a tensor are read, evenly spread.
    """
    digest = hashlib.sha256()
    tensors = [part for item in model.state_dict().items() for part in _plain(*item)]
    for name, tensor in sorted(tensors, key=operator.itemgetter(0)):
        tensor = ranks.whole(tensor)  # one at a time
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // FINGERPRINT_VALUES))
        digest.update(flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor, or those that a quantized one is made of."""
    if is_traceable_wrapper_subclass(tensor) and not ranks.is_spread(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    elif isinstance(tensor, torch.Tensor):
        yield name, tensor


def hash_file(path: str | Path) -> str:
    """Hash a file: sha256, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
