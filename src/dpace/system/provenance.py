"""Versions, hardware and hashes that belong to a number, and whether two runs are the same."""

import hashlib
import json
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
from dpace.system.ledger import JsonObject

FINGERPRINT_VALUES = 64
"""Values of each tensor that the fingerprint of a target reads."""
HASHED = {
    "init_sha256": "weights to start from",
    "target_sha256": "weights of the target",
    "train_sha256": "training answers",
    "validation_sha256": "validation answers",
    "loss.objective_sha256": "source of the objective",
}
"""What a message calls the thing that a fact is the hash of; by default the fact's name without `_sha256`."""


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
    """Return the versions of what computes."""
    return Versions(
        dpace=dpace.__version__,
        torch=version("torch"),
        transformers=version("transformers"),
        python=platform.python_version(),
    )


def find_hardware(device: torch.device) -> Hardware:
    """Return the name of the device, and the numbers of cores and threads."""
    return Hardware(device=device_name(device), cores=os.cpu_count(), torch_threads=torch.get_num_threads())


def hash_json(value: object) -> str:
    """Hash a value that JSON can hold, whatever the order of its keys: sha256, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(model: torch.nn.Module, *, dtype: str | None = None, num_values: int | None = None) -> str:
    """Hash weights, to know them again: sha256 over the name, shape, dtype and values of each tensor.

    Args:
        model: also a quantized or sharded one.
        dtype: in which the weights are hashed; their own by default.
        num_values: most values of a tensor that are read, evenly spread; all by default.
    """
    digest = hashlib.sha256()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors.update(_plain_tensors(name, tensor))
    for name in sorted(tensors):  # whatever the order in which the model was built
        tensor = ranks.whole(tensors[name])  # one at a time
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        values = tensor.detach().reshape(-1)
        if num_values:
            # The stride is rounded up, so that no more values are read.
            values = values[:: max(1, -(-values.numel() // num_values))]
        # As bytes, since numpy knows no bfloat16.
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor, or the tensors that a quantized one is made of."""
    if is_traceable_wrapper_subclass(tensor) and not ranks.is_spread(tensor):
        inner_names, _ = tensor.__tensor_flatten__()
        for inner_name in inner_names:
            yield from _plain_tensors(f"{name}.{inner_name}", getattr(tensor, inner_name))
    elif isinstance(tensor, torch.Tensor):  # a state may also hold bytes
        yield name, tensor


def hash_file(path: str | Path) -> str:
    """Hash a file: sha256, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_run(kept: JsonObject, now: JsonObject, what: str, way_out: str) -> None:
    """Refuse to go on with files that were made in another way.

    A run is described by facts: its settings, and hashes of what is too long to compare. They are computed once a
    command, written beside its files, and compared here when the files are found again. Only facts that `now` has are
    compared, so a command can already refuse what it knows before it loads a model.

    Args:
        kept: the facts that were written; one that is missing counts as different.
        now: the facts of this command, as JSON would give them back.
        what: names the files, up to the word `with`: "out/drafter holds a run".
        way_out: what the user can do.

    Raises:
        ValueError: one line, with the first difference: "out/drafter holds a run with train.seed 42, not 7; name
            another folder with --output". Of hashes it has the first digits.
    """
    for name, value in now.items():
        if name in kept and kept[name] == value:
            continue
        kept_value = kept.get(name)
        difference = f"{name} {json.dumps(kept_value)}, not {json.dumps(value)}"
        if name.endswith("_sha256"):
            thing = HASHED.get(name, name.removesuffix("_sha256").replace("_", " "))
            difference = f"other {thing} (sha256 {str(kept_value)[:12]}, not {str(value)[:12]})"
        raise ValueError(f"{what} with {difference}; {way_out}")
