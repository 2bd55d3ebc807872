"""A drafter's description for engines, and its `config.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import Qwen3Config

from dpace.blocks import build_target_layer_ids, check_block_size
from dpace.modeling_dflash import refuse_variants
from dpace.system.loading import need as need  # engines import it from here
from dpace.system.loading import need_count, need_number, take_object

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
CONV_GROUP_SIZE = 16
"""Channels that share what a convolution adds to its taps, as published."""

LayerIdFault = Literal["order", "range", "last"]


def find_layer_id_faults(target_layer_ids: Sequence[int], num_target_layers: int) -> list[LayerIdFault]:
    """Find faults in the feature layers' ids.

    They must ascend, lie in the target, and leave out its last layer. The order matters, because vLLM sorts the ids but
    not the columns of `fc`. The last layer's output is normalized in some engines and missing in others.
    """
    ids, faults = list(target_layer_ids), []
    if not ids or not all(type(i) is int for i in ids) or ids != sorted(set(ids)):
        faults.append("order")
    if not all(0 <= i < num_target_layers for i in ids):
        faults.append("range")
    if num_target_layers - 1 in ids:
        faults.append("last")
    return faults


@dataclass(frozen=True)
class DrafterSpec:
    """All that an engine must know about a drafter apart from its weights, in this project's conventions.

    Embedding and LM head are the target's in every format.
    """

    block_size: int
    """Number of slots, the anchor included; engines that count draft tokens get `num_draft_tokens`."""
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    """0-based layers whose output is used; engines that count the embedding as state 0 get `hidden_state_ids`."""
    num_target_layers: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict[str, Any]
    """Rotary embedding, as `rope_parameters` of transformers."""
    max_position_embeddings: int
    embed_scale: float = 1.0
    """Factor of the target's embedding."""
    logit_scale: float = 1.0
    softcap: float | None = None
    """Cap of the target's logits: a logit x becomes softcap * tanh(x / softcap)."""
    conv_kernel_size: int = 0
    """Slots that a convolution reads, itself included, as in DFlash2; 0 without convolutions."""
    conv_group_size: int = 0
    """Channels that share what a convolution adds to its taps; 0 without convolutions."""
    record: dict[str, Any] = field(default_factory=dict, compare=False)
    """Entry `dpace` of the config, which only this project reads: confidence temperature and record of training."""
    special_token_ids: dict[str, Any] = field(default_factory=dict, compare=False)
    """Begin, end and padding tokens, where the config has them; no engine takes them from the drafter."""

    @property
    def num_draft_tokens(self) -> int:
        """Number of draft tokens in a block: all slots but the anchor."""
        return self.block_size - 1

    @property
    def hidden_state_ids(self) -> list[int]:
        """Indices into transformers' `hidden_states`, where 0 is the embedding: one more than the layer."""
        return [layer + 1 for layer in self.target_layer_ids]

    @property
    def architecture(self) -> str:
        """Name of the network's class, by which engines choose their own."""
        return "DFlash2DraftModel" if self.conv_kernel_size else "DFlashDraftModel"

    @property
    def second(self) -> dict[str, int]:
        """The values that DFlash2 adds, under their published names; empty without convolutions.

        The selector is one that changes no choice (`NeutralSelector`); llama.cpp wants k (k + 1) <= hidden size.
        """
        if not self.conv_kernel_size:
            return {}
        top_k = next((k for k in (16, 8, 4) if k * (k + 1) <= self.hidden_size), 2)
        sizes = {"conv_kernel_size": self.conv_kernel_size, "conv_group_size": self.conv_group_size}
        return {**sizes, "selector_rank": 1, "selector_top_k": top_k}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DrafterSpec":
        """Read a `config.json` in the published layout.

        The block size and the rotary embedding may have either spelling.

        Raises:
            ValueError: a value without a safe default is missing, a value is given twice and differently, or the
                network is a variant that dpace does not support.
        """
        nested = take_object(config, "dflash_config")
        if nested.get("selector_rank") not in (None, 1):
            raise ValueError(
                f"this is a DFlash2 drafter with a candidate selector of rank {nested['selector_rank']}; dpace runs "
                "DFlash2's convolutions but no selector: serve it with the project that trained it"
            )
        refuse_variants(config)
        is_second = (config.get("architectures") or [""])[0].startswith("DFlash2")
        convolutions = {
            name: need_count(nested, name) if is_second or name in nested else 0
            for name in ("conv_kernel_size", "conv_group_size")
        }
        num_layers, num_target_layers = (need_count(config, key) for key in ("num_hidden_layers", "num_target_layers"))
        block_size = _either(config, nested, "block_size")
        layer_ids = _either(config, nested, "target_layer_ids") or build_target_layer_ids(num_target_layers, num_layers)
        return cls(
            block_size=need_count({"block_size": 16 if block_size is None else block_size}, "block_size"),
            mask_token_id=need_count(
                {"mask_token_id": _either(config, nested, "mask_token_id")}, "mask_token_id", least=0
            ),
            target_layer_ids=tuple(layer_ids) if isinstance(layer_ids, list | tuple) else (layer_ids,),
            num_target_layers=num_target_layers,
            vocab_size=need_count(config, "vocab_size"),
            hidden_size=need_count(config, "hidden_size"),
            intermediate_size=need_count(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=need_count(config, "num_attention_heads"),
            num_key_value_heads=need_count(config, "num_key_value_heads"),
            head_dim=need_count(config, "head_dim"),
            rms_norm_eps=as_float32(need_number(config, "rms_norm_eps")),
            rope=_rope(config),
            max_position_embeddings=need_count(config, "max_position_embeddings"),
            embed_scale=need_number({"input_embedding_scale": 1.0, **config}, "input_embedding_scale"),
            logit_scale=need_number({"output_multiplier": 1.0, **config}, "output_multiplier"),
            softcap=config.get("final_logit_softcapping"),
            **convolutions,
            record=take_object(config, "dpace"),
            special_token_ids={name: config[name] for name in SPECIAL_TOKENS if name in config},
        )

    def config(self) -> Qwen3Config:
        """Make the config of a `Drafter`."""
        named = {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids)}
        extra: dict[str, Any] = {"input_embedding_scale": self.embed_scale, "output_multiplier": self.logit_scale}
        extra = {name: scale for name, scale in extra.items() if scale != 1}
        if self.softcap is not None:
            extra["final_logit_softcapping"] = self.softcap
        if self.record:
            extra["dpace"] = self.record
        return Qwen3Config(
            **self.special_token_ids,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters=dict(self.rope),
            layer_types=["full_attention"] * self.num_layers,
            tie_word_embeddings=False,
            **{
                **named,
                "block_size": self.block_size,
                "num_target_layers": self.num_target_layers,
                "dflash_config": named | self.second,
                "is_causal": False,
                **extra,
            },
        )

    def published(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the `config.json` that transformers wrote with the values that engines read.

        Args:
            written: the config as `save_pretrained` of transformers wrote it.
        """
        config = {
            **written,
            "architectures": [self.architecture],
            "auto_map": {"AutoModel": "modeling_dflash.DFlashDraftModel"},
            "rope_theta": self.rope["rope_theta"],
            "head_dim": self.head_dim,
            "attention_bias": False,
            "is_causal": False,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
        }
        if self.rope["rope_type"] != "default":
            config["rope_scaling"] = self.rope
        return config

    def check(self) -> None:
        """Refuse a drafter that some engine cannot serve.

        Raises:
            ValueError: names the value, why it cannot be served and what to do.
        """
        ids, last = list(self.target_layer_ids), self.num_target_layers - 1
        for fault in find_layer_id_faults(ids, self.num_target_layers):
            raise ValueError(
                f"target_layer_ids is {ids} for a target of {last + 1} layers; "
                f"train with ascending ids in 0 .. {last - 1} "
                + {
                    "order": "(vLLM sorts them, and features and weights would no longer match)",
                    "range": f"(the target has layers 0 .. {last} only)",
                    "last": f"(the output of layer {last} is normalized in some engines and missing in others)",
                }[fault]
            )
        check_block_size(self.block_size)
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}, outside the target's embedding of {self.vocab_size} rows; "
                "train with a reserved token inside it"
            )


def _either(config: Mapping[str, Any], nested: Mapping[str, Any], key: str) -> Any:
    """Read a value from `dflash_config` or the top level; None where it is in neither."""
    inner, outer = nested.get(key), config.get(key)
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(
            f"{key} is {inner} in dflash_config and {outer} at the top level; engines read one or the other: "
            "make them equal"
        )
    return outer if inner is None else inner


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the rotary embedding from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    rope = take_object(config, "rope_parameters")
    if not rope:
        old = take_object(config, "rope_scaling")
        rope = {**old, "rope_type": old.pop("type", old.get("rope_type", "default"))}
        rope.pop("type", None)
    theta, outer = rope.get("rope_theta"), config.get("rope_theta")
    if theta is not None and outer is not None and theta != outer:
        raise ValueError(f"rope_theta is {theta} in rope_parameters and {outer} at the top level; make them equal")
    theta = outer if theta is None else theta
    if theta is None:
        raise ValueError(
            "the drafter's config has no rope_theta; engines would silently take 10000: add the target's value"
        )
    return {"rope_type": "default", **rope, "rope_theta": as_float32(need_number({"rope_theta": theta}, "rope_theta"))}


def as_float32(value: float) -> float:
    """Give the shortest decimal that is the same number in fp32: 1e-05, not 9.999999747378752e-06.

    Engines keep these numbers in fp32.
    """
    return float(str(np.float32(value)))
