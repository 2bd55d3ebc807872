"""Read a drafter's folder as it is on disk, and name its tensors.

What comes in is a folder, whole or broken; no model class is needed to read it. What goes out are its config, recipe
and tensors, also by their published names, and why any of them could not be read.
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

from dpace.drafter.kinds import published_name
from dpace.recipes.recipe_file import PlainLoader
from dpace.system.ledger import read_text
from dpace.system.loading import LIBRARY_ERRORS
from dpace.system.progress import describe_error

OTHER_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
"""Names in transformers' own container, and the published ones."""
UNREADABLE = (*LIBRARY_ERRORS, OSError, MemoryError, yaml.YAMLError, SafetensorError)
"""What reading a damaged file raises."""


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
    def record(self) -> dict[str, Any]:
        """What training recorded in the config."""
        return mapping(self.config.get("dpace"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by their published names."""
        stored = {name.removeprefix("model."): tensor for name, tensor in self.stored.items()}
        return {OTHER_NAMES.get(name, published_name(name)): tensor for name, tensor in stored.items()}


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


def to_layer_ids(hidden_state_ids: object) -> list[int]:
    """Turn indices into `hidden_states`, where 0 is the embedding, into ids of layers; the inverse of the spec's.

    Raises:
        ValueError: they are no list of integers.
    """
    if not isinstance(hidden_state_ids, list) or not all(type(index) is int for index in hidden_state_ids):
        raise ValueError(f"layer ids are {hidden_state_ids!r:.200}, expected a list of integers; copy the file again")
    return [index - 1 for index in hidden_state_ids]


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
