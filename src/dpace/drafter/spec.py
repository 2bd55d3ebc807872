"""A drafter's description for engines, and its `config.json`.

What comes in is a config in any spelling; what goes out is a `DrafterSpec` whose values were checked with pydantic, and
the config that every engine reads.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, Strict, TypeAdapter, ValidationError
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dpace.blocks import build_target_layer_ids
from dpace.drafter.dflash import CONVOLUTION_KEYS
from dpace.drafter.kinds import KINDS, Kind
from dpace.drafter.lilicorr import Scale, SelectorSizes, read_sizes
from dpace.modeling_dflash import DFlashDraftModel, refuse_variants
from dpace.system.loading import translate_library_errors

MAX_LAYERS = 1000
"""Most layers of a drafter or of a target; each costs time and memory before the weights are read."""
WHAT = "the drafter of this config"
COPY_AGAIN = "copy the config again from where the drafter was trained"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
FROM_ANCHOR = ("sample_from_anchor", "query_zero_predicts_next")
"""Names under which published configs say that slot 0 predicts the first draft token."""
CONV_GROUP_SIZE = 16
"""Channels that share what a convolution adds to its taps, as published."""


def find_layer_id_faults(target_layer_ids: Sequence[int], num_target_layers: int) -> list[str]:
    """Find why some engine cannot serve a drafter that reads these layers.

    The ids must ascend, lie in the target, and leave out its last layer.
    """
    ids, last = list(target_layer_ids), num_target_layers - 1
    faults = []
    if not ids or ids != sorted(set(ids)):
        faults.append("they do not ascend (vLLM sorts them, and features and weights would no longer match)")
    if not all(0 <= i <= last for i in ids):
        faults.append(f"the target has layers 0 .. {last} only")
    if last in ids:
        faults.append(f"the output of layer {last} is normalized in some engines and missing in others")
    return faults


def as_float32(value: float) -> float:
    """Return the shortest decimal that is the same number in fp32: 1e-05, not 9.999999747378752e-06.

    Engines keep these numbers in fp32.
    """
    return float(str(np.float32(value)))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # pyright: ignore


def _check_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Refuse a rotary embedding that transformers does not have; return it with `rope_theta` as in fp32.

    `DrafterSpec.config` tries out the rest.
    """
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    theta = rope["rope_theta"]
    if rope["rope_type"] not in kinds:
        raise ValueError(f"rope_type is {rope['rope_type']!r:.100}, expected one of {', '.join(kinds)}")
    if not _is_number(theta) or theta <= 0:
        raise ValueError(f"rope_theta is {theta!r:.100}, expected a number above 0")
    return {**rope, "rope_theta": as_float32(theta)}


def _check_record(record: dict[str, Any]) -> dict[str, Any]:
    """Refuse a confidence temperature that is none; all else is only compared."""
    temperature = record.get("confidence_temperature", 1.0)
    if not _is_number(temperature) or temperature <= 0:
        raise ValueError(f"confidence_temperature is {temperature!r:.100}, expected a number above 0")
    return record


Index = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
Count = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
LayerCount = Annotated[int, Strict(), Field(ge=1, le=MAX_LAYERS)]
Flag = Annotated[bool, Strict()]


@dataclass(frozen=True)
class DrafterSpec:
    """All that an engine must know about a drafter apart from its weights, in this project's conventions."""

    block_size: Annotated[int, Strict(), Field(ge=1, le=1000)]
    """Number of slots, the anchor included; engines that count draft tokens get `num_draft_tokens`."""
    mask_token_id: Index
    target_layer_ids: tuple[Annotated[int, Strict()], ...]
    """0-based layers whose output is used; engines that count the embedding as state 0 get `hidden_state_ids`."""
    num_target_layers: LayerCount
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Annotated[LayerCount, Field(alias="num_hidden_layers")]
    num_heads: Annotated[Count, Field(alias="num_attention_heads")]
    num_key_value_heads: Count
    head_dim: Count
    rms_norm_eps: Annotated[Scale, AfterValidator(as_float32)]
    rope: Annotated[dict[str, Any], Field(alias="rope_parameters"), AfterValidator(_check_rope)]
    """Rotary embedding, as `rope_parameters` of transformers."""
    max_position_embeddings: Count
    embed_scale: Annotated[Scale, Field(alias="input_embedding_scale")] = 1.0
    """Factor of the target's embedding."""
    logit_scale: Annotated[Scale, Field(alias="output_multiplier")] = 1.0
    softcap: Annotated[Scale | None, Field(alias="final_logit_softcapping")] = None
    """Cap of the target's logits: a logit x becomes softcap * tanh(x / softcap)."""
    conv_kernel_size: Index = 0
    """Slots that a convolution reads, itself included, as in DFlash2; 0 without convolutions."""
    conv_group_size: Index = 0
    """Channels that share what a convolution adds to its taps; 0 without convolutions."""
    sample_from_anchor: Flag = False
    """Whether each slot predicts the token behind its own position, as in DeepSpec: `block_size` slots give as many
    draft tokens. Otherwise a slot predicts the token at its position, and slot 0 none."""
    selector: SelectorSizes | None = None
    """Sizes of a LiLiCorr selector; None without one."""
    sliding_window: Count | None = None
    """Window of sliding layers, in tokens, see `dpace.modeling_dflash.DFlashAttention`; None without such layers."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] = ()
    """Kind of each layer; empty where all have full attention."""
    is_causal: Flag | Literal["sliding"] = False
    """Whether a slot sees no slot after it: in all layers, in no layer, or in sliding layers only."""
    has_own_embed_tokens: Flag = False
    """Whether the embedding is the drafter's own, and not the target's."""
    has_own_lm_head: Flag = False
    """The same of an LM head for all tokens."""
    draft_vocab_size: Index = 0
    """Rows of an own LM head for some tokens, which `d2t` names; 0 without one."""
    record: Annotated[dict[str, Any], Field(alias="dpace"), AfterValidator(_check_record)] = field(
        default_factory=dict, compare=False
    )
    """Entry `dpace` of the config, which only this project reads: confidence temperature and record of training."""
    special_token_ids: dict[str, Any] = field(default_factory=dict, compare=False)
    """Begin, end and padding tokens, where the config has them; no engine takes them from the drafter."""

    @property
    def num_draft_tokens(self) -> int:
        """Number of draft tokens in a block: all slots but the anchor, or all of them."""
        return self.block_size - 1 + self.sample_from_anchor

    @property
    def hidden_state_ids(self) -> list[int]:
        """Indices into transformers' `hidden_states`, where 0 is the embedding: one more than the layer."""
        return [layer + 1 for layer in self.target_layer_ids]

    @property
    def selector_width(self) -> int:
        """Width of the selector; that of the drafter without one."""
        return self.selector and self.selector.hidden_size or self.hidden_size

    @property
    def kind(self) -> Kind:
        """What is known of drafters like it."""
        return KINDS["lilicorr" if self.selector else "dflash2" if self.conv_kernel_size else "dflash"]

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor of its network, by its published name.

        Raises:
            ValueError: sizes that no network has.
        """
        config = self.config()
        with translate_library_errors(WHAT, COPY_AGAIN), torch.device("meta"):
            network = DFlashDraftModel(config)
        return {name: tensor.shape for name, tensor in network.state_dict().items()}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "DrafterSpec":
        """Make a spec from values under their published names; others are ignored, and None is a missing value.

        Raises:
            ValueError: a value that no drafter has, or none where one is needed; names it.
        """
        values = {name: value for name, value in values.items() if value is not None}
        try:
            spec = _SPEC.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if name == "selector":
                values = {f"lilicorr_{key}": value for key, value in values["selector"].items()}
                name = f"lilicorr_{first['loc'][1]}"
            if first["type"] == "missing":
                raise ValueError(f"the drafter's config has no {name}; {COPY_AGAIN}") from error
            fault = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
            fault = fault.replace("a valid tuple", "a list").replace("a valid dictionary", "an object")
            text = "the text " if isinstance(values[name], str) else ""
            raise ValueError(f"{name} is {text}{values[name]!r:.100}: {fault}; {COPY_AGAIN}") from error
        if spec.num_heads % spec.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {spec.num_heads}, expected a multiple of num_key_value_heads, which is "
                f"{spec.num_key_value_heads}; {COPY_AGAIN}"
            )
        if spec.selector:
            spec.selector.check(spec)
        eos = spec.special_token_ids.get("eos_token_id")
        for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            if type(token) is not int or not 0 <= token < spec.vocab_size:
                raise ValueError(
                    f"eos_token_id is {eos!r:.100}, expected numbers of tokens, 0 to {spec.vocab_size - 1}; correct "
                    "it, or leave it out"
                )
        if "sliding_attention" not in spec.layer_types:
            spec = replace(spec, layer_types=(), sliding_window=None)
        elif spec.sliding_window is None:
            raise ValueError(f"the drafter's config has sliding layers and no sliding_window; {COPY_AGAIN}")
        spec.config()
        return spec

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DrafterSpec":
        """Read a `config.json` in the published layout.

        The block size and the rotary embedding may have either spelling.

        Raises:
            ValueError: a value without a safe default is missing, a value is given twice and differently, a value that
                no drafter has, or a variant of the network that dpace does not support.
        """
        nested = _read_object(config, "dflash_config")
        if nested.get("selector_rank") not in (None, 1):
            raise ValueError(
                f"this is a DFlash2 drafter with a candidate selector of rank {nested['selector_rank']}; dpace runs "
                "DFlash2's convolutions but no selector: serve it with the project that trained it"
            )
        refuse_variants(config)
        if quantized := _read_object(config, "quantization_config"):
            raise ValueError(
                f"quantization_config has the method {quantized.get('quant_method')!r:.50}, and drafters run in "
                "float32, bfloat16 or float16; `dpace import FOLDER --output PLAIN` writes the weights so"
            )
        convolutions = {name: nested.get(name) for name in CONVOLUTION_KEYS}
        is_second = "DFlash2" in str(config.get("architectures"))
        for name, size in convolutions.items():
            if is_second and not size:
                raise ValueError(f"the drafter's config has no {name}; {COPY_AGAIN}")
        block_size = _either(config, nested, "block_size")
        layer_ids = _either(config, nested, "target_layer_ids")
        from_anchor = [_either(config, nested, name) for name in FROM_ANCHOR]
        is_small = config.get("draft_vocab_size") not in (None, config.get("vocab_size"))
        spec = cls.from_values(
            {
                **config,
                "draft_vocab_size": config["draft_vocab_size"] if is_small else 0,
                "has_own_lm_head": not is_small and config.get("has_own_lm_head"),
                **convolutions,
                "selector": read_sizes(config, nested),
                "block_size": 16 if block_size is None else block_size,
                "mask_token_id": _either(config, nested, "mask_token_id"),
                "sample_from_anchor": next((value for value in from_anchor if value is not None), False),
                "target_layer_ids": () if layer_ids is None else layer_ids,
                "rope_parameters": read_rope(config),
                "is_causal": _read_causality(config, nested),
                "special_token_ids": {name: config[name] for name in SPECIAL_TOKENS if name in config},
            }
        )
        if spec.target_layer_ids:
            return spec
        return replace(spec, target_layer_ids=tuple(build_target_layer_ids(spec.num_target_layers, spec.num_layers)))

    def config(self) -> Qwen3Config:
        """Make the config of a `Drafter`.

        Raises:
            ValueError: values that transformers refuses, or that give no rotation.
        """
        elsewhere = {*CONVOLUTION_KEYS, "selector", "special_token_ids"}
        values = _SPEC.dump_python(self, mode="json", by_alias=True, exclude_defaults=True, exclude=elsewhere)
        nested = ("mask_token_id", "target_layer_ids", "sample_from_anchor")
        named = {name: values[name] for name in nested if name in values}
        attention = {
            "layer_types": list(self.layer_types) or ["full_attention"] * self.num_layers,
            "use_sliding_window": self.sliding_window is not None,
            "is_causal": None if self.is_causal == "sliding" else self.is_causal,
        }
        with translate_library_errors(WHAT, COPY_AGAIN):
            config = Qwen3Config(
                **self.special_token_ids,
                **values | attention,
                tie_word_embeddings=False,
                dflash_config=named | self.kind.config_keys(self),  # pyright: ignore[reportCallIssue]
            )
        rope = f"rope_parameters is {self.rope!r:.300}"
        with translate_library_errors(f"the drafter ({rope})", COPY_AGAIN), torch.device("cpu"):  # also on paper
            rotary = Qwen3RotaryEmbedding(config)
            cosines, _ = rotary(torch.zeros(1), torch.tensor([[self.max_position_embeddings]]))
            is_right = cosines.shape[-1] == self.head_dim and bool(cosines.isfinite().all())
            if not is_right or (rotary.inv_freq < 0).any():
                raise ValueError(f"it gives no rotation of heads of {self.head_dim} numbers")
        return config

    def published(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the `config.json` that transformers wrote with the values that engines read."""
        config = {
            **written,
            "architectures": [self.kind.architecture],
            "auto_map": {"AutoModel": "modeling_dflash.DFlashDraftModel"},
            "rope_theta": self.rope["rope_theta"],
            "head_dim": self.head_dim,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "use_cache": True,
        }
        if self.rope["rope_type"] != "default":
            config["rope_scaling"] = self.rope
        return config

    def check(self) -> None:
        """Refuse a drafter that some engine cannot serve.

        Raises:
            ValueError: names the value, why it cannot be served and what to do.
        """
        for fault in find_layer_id_faults(self.target_layer_ids, self.num_target_layers):
            raise ValueError(
                f"target_layer_ids is {list(self.target_layer_ids)} for a target of {self.num_target_layers} layers: "
                f"{fault}; train with ascending ids in 0 .. {self.num_target_layers - 2}"
            )
        if self.block_size < 2:
            raise ValueError(
                f"block_size is {self.block_size}; it must be 2 or more: an anchor and at least one draft slot"
            )
        if self.selector:
            self.selector.check(self)
        if self.sliding_window is not None and self.sliding_window <= self.block_size:
            raise ValueError(
                f"sliding_window is {self.sliding_window} and block_size {self.block_size}; a window must be longer "
                "than a block, so that each slot sees some text"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}, outside the target's embedding of {self.vocab_size} rows; "
                "train with a reserved token inside it"
            )


def own_tables(names: Iterable[str]) -> dict[str, bool]:
    """Return what tensors of these names say in a config: which tables are the drafter's own."""
    return {f"has_own_{name}": f"{name}.weight" in names for name in ("embed_tokens", "lm_head")}


def _either(config: Mapping[str, Any], nested: Mapping[str, Any], key: str) -> Any:
    """Read a value from `dflash_config` or the top level; None where it is in neither."""
    inner, outer = nested.get(key), config.get(key)
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(
            f"{key} is {inner!r} in dflash_config and {outer!r} at the top level; engines read one or the other: "
            "make them equal"
        )
    return outer if inner is None else inner


def _read_causality(config: Mapping[str, Any], nested: Mapping[str, Any]) -> Any:
    """Read `is_causal`; where the config does not say, sliding layers are causal, as in z-lab's code and vLLM."""
    found = _either({"causal": config.get("is_causal")}, nested, "causal")
    kinds = config.get("layer_types")
    if kinds is None and config.get("use_sliding_window"):
        raise ValueError(f"the drafter's config has use_sliding_window and no layer_types; {COPY_AGAIN}")
    if found is not None or not isinstance(kinds, list | tuple) or "sliding_attention" not in kinds:
        return found
    return "sliding" if "full_attention" in kinds else True


def _read_object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read an object; an empty one where the config has none."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r:.100}, expected an object; {COPY_AGAIN}")
    return dict(value or {})


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the rotary embedding from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    rope = _read_object(config, "rope_parameters")
    if not rope:
        rope = _read_object(config, "rope_scaling")
        rope.setdefault("rope_type", rope.get("type", "default"))
        rope.pop("type", None)
    theta = rope.get("rope_theta")
    outer = config.get("rope_theta")
    if theta is not None and outer is not None and theta != outer:
        raise ValueError(f"rope_theta is {theta!r} in rope_parameters and {outer!r} at the top level; make them equal")
    theta = outer if theta is None else theta
    if theta is None:
        raise ValueError(
            "the drafter's config has no rope_theta; engines would silently take 10000: add the target's value"
        )
    return {"rope_type": "default", **rope, "rope_theta": theta}


_SPEC = TypeAdapter(DrafterSpec)
