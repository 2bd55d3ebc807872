"""Read a drafter's folder as it is on disk, and name its tensors.

What comes in is a folder, whole or broken; no model class is needed to read it. What goes out are its config, recipe
and tensors, and why any of them could not be read. Names and axes of the tensors are those of the published layout and
of llama.cpp.
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

from dpace.drafter.spec import DrafterSpec
from dpace.recipes.recipe_file import PlainLoader
from dpace.system.ledger import read_text
from dpace.system.progress import printable

TENSORS = {
    "fc.weight": ("hidden feature", "fc.weight"),
    "hidden_norm.weight": ("hidden", "enc.output_norm.weight"),
    "norm.weight": ("hidden", "output_norm.weight"),
}
LAYER_TENSORS = {
    "input_layernorm.weight": ("hidden", "attn_norm.weight"),
    "self_attn.q_proj.weight": ("query hidden", "attn_q.weight"),
    "self_attn.k_proj.weight": ("key hidden", "attn_k.weight"),
    "self_attn.v_proj.weight": ("key hidden", "attn_v.weight"),
    "self_attn.o_proj.weight": ("hidden query", "attn_output.weight"),
    "self_attn.q_norm.weight": ("head", "attn_q_norm.weight"),
    "self_attn.k_norm.weight": ("head", "attn_k_norm.weight"),
    "post_attention_layernorm.weight": ("hidden", "ffn_norm.weight"),
    "mlp.gate_proj.weight": ("inner hidden", "ffn_gate.weight"),
    "mlp.up_proj.weight": ("inner hidden", "ffn_up.weight"),
    "mlp.down_proj.weight": ("hidden inner", "ffn_down.weight"),
}
"""Published name of each tensor, its axes, and llama.cpp's name.

`query` is heads x head_dim, `key` the same for key heads.
"""
SELECTOR_TENSORS = {
    "candidate_selector.predecessor_codebook": ("vocab rank", "selector_predecessor.weight"),
    "candidate_selector.successor_codebook": ("vocab rank", "selector_successor.weight"),
    "candidate_selector.hidden_projection.weight": ("rank hidden", "selector_hidden.weight"),
}
CONVOLUTION_TENSORS = {
    "attention_conv.base_kernel": ("side tap hidden", "attn_conv_base"),
    "attention_conv.kernel_projection.weight": ("kernel hidden", "attn_conv_proj.weight"),
    "mlp_conv.base_kernel": ("side tap hidden", "ffn_conv_base"),
    "mlp_conv.kernel_projection.weight": ("kernel hidden", "ffn_conv_proj.weight"),
}
"""The same of drafters with convolutions; `kernel` is sides x taps x groups of channels."""


def list_tensors(num_layers: int, *, has_convolutions: bool) -> dict[str, tuple[str, str]]:
    """Return axes and llama.cpp's name of every tensor of a drafter, by its published name.

    Nothing is permuted for llama.cpp, because the drafter's rotary embedding is NeoX's.
    """
    tensors = TENSORS | (SELECTOR_TENSORS if has_convolutions else {})
    of_layers = LAYER_TENSORS | (CONVOLUTION_TENSORS if has_convolutions else {})
    for layer in range(num_layers):
        tensors |= {f"layers.{layer}.{name}": (axes, f"blk.{layer}.{gguf}") for name, (axes, gguf) in of_layers.items()}
    return tensors


def axis_sizes(spec: DrafterSpec) -> dict[str, int]:
    """Return the length of each axis of a drafter's tensors."""
    return {
        "hidden": spec.hidden_size,
        "feature": len(spec.target_layer_ids) * spec.hidden_size,
        "query": spec.num_heads * spec.head_dim,
        "key": spec.num_key_value_heads * spec.head_dim,
        "head": spec.head_dim,
        "inner": spec.intermediate_size,
        "vocab": spec.vocab_size,
        "rank": 1,
        "side": 2,
        "tap": spec.conv_kernel_size,
        "kernel": 2 * spec.conv_kernel_size * (spec.hidden_size // max(1, spec.conv_group_size)),
    }


OTHER_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
"""Names in transformers' own container, and the published ones."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError)
UNREADABLE += (yaml.YAMLError, SafetensorError)
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
        return {OTHER_NAMES.get(name, name): tensor for name, tensor in stored.items()}

    @cached_property
    def num_layers(self) -> int:
        """Number of layers that have a tensor."""
        return 1 + max((int(found[1]) for name in self.tensors if (found := LAYER_NAME.match(name))), default=-1)

    @cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of each tensor that there should be."""
        known = list_tensors(self.num_layers, has_convolutions="layers.0.mlp_conv.base_kernel" in self.tensors)
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
        problems[file.name] = describe_error(error)
    else:
        if isinstance(content, dict):
            return content
        problems[file.name] = f"it holds a {type(content).__name__}, expected named values"
    return {}


def describe_error(error: BaseException) -> str:
    """Return what went wrong, in one line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


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
