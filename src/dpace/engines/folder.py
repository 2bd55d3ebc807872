"""Read a drafter's folder as it is on disk, and name its tensors.

What comes in is a folder, whole or broken; no model class is needed to read it. What goes out are its config, recipe
and tensors, and why any of them could not be read. `dpace.drafter.kinds` has the names and axes of the tensors.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpace.drafter import lilicorr
from dpace.drafter.dflash import TABLES, Parts
from dpace.drafter.kinds import KINDS
from dpace.recipes.recipe_file import PlainLoader
from dpace.system.ledger import read_text
from dpace.system.loading import LIBRARY_ERRORS
from dpace.system.progress import describe_error

OTHER_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
"""Names in transformers' own container, and the published ones."""
UNREADABLE = (*LIBRARY_ERRORS, OSError, MemoryError, yaml.YAMLError, SafetensorError)
"""What reading a damaged file raises."""
LAYER_NAME = re.compile(r"layers\.(\d{1,3})\.")
"""How the names of a layer's tensors begin; no drafter has a thousand layers."""


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
        """Return a key of DFlash, from `dflash_config` or else the top level; None where it is missing."""
        return self.nested.get(key, self.config.get(key))

    @property
    def record(self) -> dict[str, Any]:
        """What training recorded in the config."""
        return mapping(self.config.get("dpace"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by their published names."""
        stored = {name.removeprefix("model."): tensor for name, tensor in self.stored.items()}
        return {OTHER_NAMES.get(name, lilicorr.published_name(name)): tensor for name, tensor in stored.items()}

    @cached_property
    def num_layers(self) -> int:
        """Number of layers that have a tensor."""
        return 1 + max((int(found[1]) for name in self.tensors if (found := LAYER_NAME.match(name))), default=-1)

    @cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of each tensor that there should be."""
        parts = Parts(
            num_layers=self.num_layers,
            has_taps="layers.0.mlp_conv.base_kernel" in self.tensors,
            num_head_layers=lilicorr.count_head_layers(self.tensors),
            has_projection=f"{lilicorr.PREFIX}token_proj.weight" in self.tensors,
        )
        known = KINDS[parts.kind].tensors(parts)
        known |= {name: axes for name, axes in TABLES.items() if name in self.tensors}
        return {name: tuple(axes.split()) for name, (axes, _) in known.items()}

    def size(self, axis: str) -> int | None:
        """Return the length of an axis; None where the tensors that have it differ."""
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
    path = Path(path)
    problems: dict[str, str] = {}
    config = _read_named_values(path / "config.json", lambda file: json.loads(read_text(file, "a JSON file")), problems)
    recipe = read_recipe_values(path, problems)
    stored = _read_named_values(path / "model.safetensors", _read_weights, problems)
    return DrafterFolder(path, config, recipe, stored, problems)


def read_recipe_values(folder: str | Path, problems: dict[str, str]) -> dict[str, Any]:
    """Read the `recipe.yaml` of a drafter's folder; empty where there is none, or a problem."""
    file = Path(folder) / "recipe.yaml"
    if not file.exists():
        return {}
    return _read_named_values(file, lambda file: yaml.load(read_text(file, "a YAML file"), PlainLoader), problems)


def mapping(value: object) -> dict[str, Any]:
    """Return the value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def _read_named_values(file: Path, read: Callable[[Path], object], problems: dict[str, str]) -> dict[str, Any]:
    """Read a file, or note why that is not possible."""
    try:
        content = read(file)
    except UNREADABLE as error:
        problems[file.name] = describe_error(error)[:300]
    else:
        if isinstance(content, dict):
            return content
        problems[file.name] = f"it holds a {type(content).__name__}, expected named values"
    return {}


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of one file, or of all files that the index names."""
    index = file.with_name("model.safetensors.index.json")
    shards = [file.name]
    if index.exists():
        shards = sorted(set(mapping(json.loads(read_text(index, "a JSON file")))["weight_map"].values()))
    tensors = {}
    for name in shards:
        shard = file.with_name(name)
        if not name.endswith(".safetensors"):
            raise ValueError(f"the index names {name}, expected a file of safetensors")
        if shard.exists() and not shard.is_file():
            raise ValueError(f"{name} is no regular file")
        tensors |= load_file(shard)
    return tensors
