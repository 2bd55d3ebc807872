"""What the values of a drafter's description may be, before anything is made from them."""

import math
from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpace.spec import DrafterSpec

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
