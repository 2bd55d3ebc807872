"""Read a drafter's folder in the published DFlash layout, and make a `Drafter` of it.

What the values of a drafter's description may be, before anything is made from them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec
from dpace.engines.folder import read_files, tensor_axes
from dpace.engines.speculators import of_speculators

MAX_LAYERS = 1000
"""Most layers of a drafter or of a target; each costs time and memory before the weights are read."""
MAX_SIZE = 2**31 - 1
"""Largest size that the engines take."""
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "block_size",
)
LAYERS = ("num_hidden_layers", "num_target_layers")
SCALES = ("rms_norm_eps", "rope_theta", "input_embedding_scale", "output_multiplier", "final_logit_softcapping")
MAPPINGS = ("dflash_config", "rope_parameters", "rope_scaling", "dpace")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a `config.json` with a value that no drafter has.

    Raises:
        ValueError: names the key, the value and what was expected.
    """
    for name in MAPPINGS:
        _expect(config, name, "an object", lambda value: isinstance(value, dict))
    _expect(
        config,
        "architectures",
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    )
    nested = config.get("dflash_config") or {}
    for place in (config, nested):
        for name in COUNTS:
            _expect(place, name, f"an integer in 1 .. {MAX_SIZE}", lambda value: _is_count(value, 1, MAX_SIZE))
        for name in LAYERS:
            _expect(place, name, f"an integer in 1 .. {MAX_LAYERS}", lambda value: _is_count(value, 1, MAX_LAYERS))
        for name in ("conv_kernel_size", "conv_group_size"):
            _expect(place, name, f"an integer in 0 .. {MAX_SIZE}", lambda value: _is_count(value, 0, MAX_SIZE))
        _expect(place, "mask_token_id", "a token id", lambda value: _is_count(value, 0, MAX_SIZE))
        _expect(
            place,
            "target_layer_ids",
            "a list of integers",
            lambda value: isinstance(value, list) and all(type(one) is int for one in value),
        )
    for name in SCALES:
        _expect(config, name, "a number above 0", _is_scale)
    for name in ("rope_parameters", "rope_scaling"):
        check_rope(config.get(name) or {})


def check_rope(rope: Mapping[str, Any]) -> None:
    """Refuse a rotary embedding that transformers does not have."""
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    for name in ("rope_type", "type"):
        _expect(rope, name, f"one of {', '.join(kinds)}", lambda value: isinstance(value, str) and value in kinds)
    for name, value in rope.items():
        if name in ("rope_type", "type") or isinstance(value, bool):
            continue
        if isinstance(value, list):
            _expect(rope, name, "a list of numbers", lambda found: all(map(_is_number, found)))
        else:
            _expect(rope, name, "a number", _is_number)
    _expect(rope, "rope_theta", "a number above 0", _is_scale)


def check_spec(spec: DrafterSpec) -> None:
    """Refuse a description with a value that no drafter has, from whatever file it was read.

    Raises:
        ValueError: names the value and what was expected.
    """
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "rope": "rope_parameters"}
    names |= {"embed_scale": "input_embedding_scale", "logit_scale": "output_multiplier"}
    names |= {"softcap": "final_logit_softcapping"}
    values = {names.get(name, name): value for name, value in vars(spec).items()}
    check_config({**values, "target_layer_ids": list(spec.target_layer_ids), "dpace": spec.record})
    if spec.num_heads % spec.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads is {spec.num_heads}, expected a multiple of num_key_value_heads, which is "
            f"{spec.num_key_value_heads}; copy the config again"
        )


def _expect(place: Mapping[str, Any], name: str, expected: str, is_right: Any) -> None:
    value = place.get(name)
    if value is not None and not is_right(value):
        raise ValueError(f"{name} is {value!r:.100}, expected {expected}; copy the config again from where it was made")


def _is_count(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)  # pyright: ignore


def _is_scale(value: object) -> bool:
    return _is_number(value) and value > 0  # pyright: ignore


def read_folder(folder: str | Path, *, num_target_layers: int | None = None) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Read a z-lab, SpecForge or speculators folder.

    Args:
        folder: with `config.json` and safetensors.
        num_target_layers: of the target, which speculators' format does not say.

    Returns:
        The spec, and the weights under this project's names, as they are in the files.

    Raises:
        ValueError: no such folder, or a config or tensors that this project does not know.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a drafter's folder: it has no config.json; name a folder that has one, or a .gguf file"
        )
    if (folder / "mask_embedding.pt").exists():
        raise ValueError(
            f"{folder} has a mask embedding of its own (mask_embedding.pt), expected none: dpace uses the target's "
            "embedding; this drafter cannot be used"
        )
    files = read_files(folder)
    damaged = {file: problem for file, problem in files.problems.items() if file != "recipe.yaml"}  # not needed here
    for file, problem in damaged.items():
        raise ValueError(f"{folder / file} is damaged ({problem}); copy or export it again")
    config = files.config
    try:
        if "speculators_model_type" in config:
            config = of_speculators(config, num_target_layers)
        check_config(config)
        spec = DrafterSpec.from_config(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return spec, {name: t for name, t in files.tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def make_drafter(spec: DrafterSpec, tensors: dict[str, Tensor]) -> Drafter:
    """Put weights into a drafter as they are, dtype included.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape.
    """
    check_spec(spec)
    sizes = {"hidden": spec.hidden_size, "head": spec.head_dim, "inner": spec.intermediate_size}
    sizes |= {"query": spec.num_heads * spec.head_dim, "key": spec.num_key_value_heads * spec.head_dim}
    sizes["feature"] = len(spec.target_layer_ids) * spec.hidden_size
    sizes |= {"vocab": spec.vocab_size, "rank": 1, "side": 2, "tap": spec.conv_kernel_size}
    sizes["kernel"] = 2 * spec.conv_kernel_size * (spec.hidden_size // max(1, spec.conv_group_size))
    axes = tensor_axes(spec.num_layers, has_convolutions=spec.conv_kernel_size > 0)
    missing, unknown = sorted(axes.keys() - tensors.keys()), sorted(tensors.keys() - axes.keys())
    if missing or unknown:
        raise ValueError(
            f"these are not the tensors of a DFlash drafter with {spec.num_layers} layers: missing "
            f"{missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}; drafters with their own embedding, head or "
            "vocabulary cannot be used"
        )
    for name, tensor in tensors.items():
        expected = tuple(sizes[axis] for axis in axes[name])
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {expected} by the config: config and weights belong "
                "to different drafters; copy both again"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, expected float32, bfloat16 or float16; take "
                "a drafter whose weights are not quantized"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; copy it again, or take an earlier checkpoint")
    drafter = _build(spec)
    drafter.load_state_dict(tensors, assign=True)
    drafter.refuse_trained_selector()
    return drafter.requires_grad_(False)


def _build(spec: DrafterSpec) -> Any:
    """Make the network of a spec; it is no larger than its tensors, which were compared with the spec."""
    try:
        with torch.random.fork_rng():
            return Drafter(spec.config()).eval()
    except (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the config describes no network that can be made ({type(error).__name__}: {said}); copy it again from "
            "where it was made"
        ) from error
