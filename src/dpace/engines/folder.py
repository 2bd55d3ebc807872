"""A drafter's folder as it is on disk.

It is read without any model class, so that a broken folder can be examined too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpace.spec import tensor_axes

OTHER_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
"""Names in transformers' own container, and the published ones."""


@dataclass
class DrafterFolder:
    """Contents of the files; one that cannot be read is empty, with the reason in `problems`."""

    path: Path
    config: dict[str, Any]
    recipe: dict[str, Any]
    """Contents of `recipe.yaml`; empty where there is none."""
    stored: dict[str, Tensor]
    """Tensors by the names in the file."""
    problems: dict[str, str]
    """Reason why a file could not be read, by the file's name."""

    @property
    def nested(self) -> dict[str, Any]:
        """The part of the config that most engines read."""
        return mapping(self.config.get("dflash_config"))

    def value(self, key: str) -> Any:
        """Give a key of DFlash, from `dflash_config` or else the top level; None where it is missing."""
        return self.nested.get(key, self.config.get(key))

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding by `rope_parameters`, or else by the older keys."""
        old = {"rope_theta": self.config.get("rope_theta"), **mapping(self.config.get("rope_scaling"))}
        return mapping(self.config.get("rope_parameters")) or old

    @property
    def record(self) -> dict[str, Any]:
        """What training recorded in the config."""
        return mapping(self.config.get("dpace"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by their published names."""
        return {published_name(name): tensor for name, tensor in self.stored.items()}

    @cached_property
    def num_layers(self) -> int:
        """Number of layers that have a tensor."""
        return 1 + max((int(name.split(".")[1]) for name in self.tensors if name.startswith("layers.")), default=-1)

    @cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of each tensor that there should be."""
        return tensor_axes(self.num_layers)

    def size(self, axis: str) -> int | None:
        """Give the length of an axis; None where the tensors that have it differ."""
        lengths = {
            length
            for name, axes in self.axes.items()
            if name in self.tensors and self.tensors[name].dim() == len(axes)
            for length, one in zip(self.tensors[name].shape, axes, strict=True)
            if one == axis
        }
        return lengths.pop() if len(lengths) == 1 else None


def read_files(path: str | Path) -> DrafterFolder:
    """Read a drafter's files; those that cannot be read are noted as problems.

    They are `config.json`, `model.safetensors` (also in shards) and, where there is one, `recipe.yaml`.
    """
    path, problems = Path(path), {}
    config = _read(path / "config.json", lambda file: json.loads(file.read_text()), problems)
    recipe = {}
    if (path / "recipe.yaml").exists():
        recipe = _read(path / "recipe.yaml", lambda file: yaml.safe_load(file.read_text()), problems)
    stored = _read(path / "model.safetensors", _read_weights, problems)
    return DrafterFolder(path, config, recipe, stored, problems)


def mapping(value: object) -> dict[str, Any]:
    """Give the value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def published_name(name: str) -> str:
    """Give the name that a tensor has in the published layout."""
    name = name.removeprefix("model.")
    return OTHER_NAMES.get(name, name)


def _read(file: Path, read: Callable[[Path], object], problems: dict[str, str]) -> dict[str, Any]:
    """Read a file, or note why that is not possible."""
    try:
        content = read(file)
    except FileNotFoundError as error:
        problems[file.name] = f"there is no file {error.filename or file}"
    except (OSError, ValueError, KeyError, yaml.YAMLError, SafetensorError) as error:
        problems[file.name] = f"{type(error).__name__}: {error}"
    else:
        if isinstance(content, dict):
            return content
        problems[file.name] = f"it holds a {type(content).__name__}, expected named values"
    return {}


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of one file, or of all files that the index names."""
    index = file.with_name("model.safetensors.index.json")
    if not index.exists():
        return load_file(file)
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in load_file(file.with_name(shard)).items()}
