"""A drafter's description for engines, its `config.json`, and its folder in the published DFlash layout.

What comes in is a config in any spelling; what goes out is a `DrafterSpec` whose values were checked with pydantic, and
the config that every engine reads. A folder gives its tensors too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from pydantic import AfterValidator, Field, InstanceOf, Strict
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import dpace.modeling_dflash
from dpace.blocks import build_target_layer_ids
from dpace.config import DrafterConfig, SelectorName
from dpace.drafter.selector import SelectorSizes
from dpace.drafter.values import (
    COPY_AGAIN,
    Flag,
    Index,
    LayerCount,
    Scale,
    StrictCount,
    read_either,
    read_group,
    read_values,
)
from dpace.modeling_dflash import DFlashDraftModel, refuse_variants
from dpace.system.ledger import JsonObject, refuse_endless
from dpace.system.loading import read_config, translate_library_errors
from dpace.system.validation import adapter

WHAT = "the drafter of this config"
FROM_ANCHOR = "query_zero_predicts_next"
"""Another name of `sample_from_anchor` in published configs."""
SCALES = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")
"""What the target does to embeddings and logits; z-lab's code looks into `dflash_config`, others at the top level."""
EITHER = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "sample_from_anchor",
    FROM_ANCHOR,
    *SCALES,
)
"""Keys that stand in `dflash_config` or at the top level."""
LAYER_SIZES = ("conv_kernel_size", "conv_group_size")
"""Sizes in `dflash_config` of what a layer has beside DFlash's; 0 or missing in a layer without it."""
FIX = "copy config and weights again, or `dpace import` the drafter if another program wrote it"
UNREAD = {
    "embed_tokens.weight",
    "lm_head.weight",
    "t2d",
    "verifier_norm.weight",
    "verifier_lm_head.weight",
    "confidence_head.proj.weight",
    "confidence_head.proj.bias",
    "conf_proj.weight",
    "conf_proj.bias",
}
"""Tensors that may be left out: tables that the config calls the target's, what speculators trains with, and DSpark's
head for confidences, in safetensors and GGUF, in whose place dpace has calibrated probabilities."""
SELECTORS: dict[str, type[SelectorSizes]] = {
    name: import_module(f"dpace.drafter.{name}").SIZES for name in get_args(SelectorName)
}
"""Sizes of the selectors that there are, a file each; `dpace.modeling_dflash` has their networks."""


def are_servable(target_layer_ids: Sequence[int], num_target_layers: int) -> bool:
    """Return whether every engine can serve a drafter that reads these layers.

    The ids must ascend: vLLM sorts them, and features and weights would no longer match. They must lie in the target,
    and leave out its last layer, whose output is normalized in some engines and missing in others.
    """
    ids = list(target_layer_ids)
    return bool(ids) and ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < num_target_layers - 1


def as_float32(value: float) -> float:
    """Return the shortest decimal that is the same number in fp32: 1e-05, not 9.999999747378752e-06.

    Engines keep these numbers in fp32.
    """
    return float(str(np.float32(value)))  # numpy prints the shortest one


Float32 = Annotated[Scale, AfterValidator(as_float32)]


@dataclass(frozen=True)
class Numbers:
    """What is read of the objects of a config; `DrafterSpec.config` tries out the rest of the rotation."""

    rope_theta: Float32
    confidence_temperature: Scale = 1.0
    tau: float = 0.0
    tau_interval: tuple[float | None, float | None] = (None, None)
    tau_responses: tuple[str, ...] = ()
    reach_rate: tuple[float, ...] = ()


@dataclass(frozen=True)
class DrafterSpec:
    """All that an engine must know about a drafter apart from its weights, in this project's conventions."""

    block_size: Annotated[int, Strict(), Field(ge=2, le=1000)]
    """Number of slots, the anchor included; engines that count draft tokens get `num_draft_tokens`."""
    mask_token_id: Index
    target_layer_ids: tuple[Annotated[int, Strict()], ...]
    """0-based layers whose output is used; engines that count the embedding as state 0 get `hidden_state_ids`."""
    num_target_layers: LayerCount
    vocab_size: StrictCount
    hidden_size: StrictCount
    intermediate_size: StrictCount
    num_layers: Annotated[LayerCount, Field(alias="num_hidden_layers")]
    num_attention_heads: StrictCount
    num_key_value_heads: StrictCount
    head_dim: Annotated[StrictCount, Field(le=2**16)]
    """Numbers of each head. The bound keeps the rotation small, which is tried out before the weights are read."""
    rms_norm_eps: Float32
    rope_parameters: JsonObject
    """Rotary embedding, as `rope_parameters` of transformers."""
    max_position_embeddings: StrictCount
    input_embedding_scale: Float32 = 1.0
    """Factor of the target's embedding."""
    output_multiplier: Float32 = 1.0
    final_logit_softcapping: Float32 | None = None
    """Cap c of the target's logits: a logit x becomes c * tanh(x / c)."""
    conv_kernel_size: Index = 0
    """Slots that a convolution reads, itself included, as in DFlash2; 0 without convolutions."""
    conv_group_size: Index = 0
    """Channels that share what a convolution adds to its taps; 0 without convolutions."""
    sample_from_anchor: Flag = False
    """Whether each slot predicts the token after its own position, as in DeepSpec: `block_size` slots give as many
    draft tokens. Otherwise a slot predicts the token at its position, and slot 0 none."""
    selector: InstanceOf[SelectorSizes] | None = None
    """Sizes of a selector with a network of its own; None without one."""
    sliding_window: StrictCount | None = None
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
    record: Annotated[JsonObject, Field(alias="dpace")] = field(default_factory=dict, compare=False)
    """Entry `dpace` of the config, which only this project reads: confidence temperature and record of training."""

    @property
    def num_draft_tokens(self) -> int:
        """Number of draft tokens in a block: all slots but the anchor, or all of them."""
        return self.block_size - 1 + self.sample_from_anchor

    @property
    def hidden_state_ids(self) -> list[int]:
        """Indices into transformers' `hidden_states`, where 0 is the embedding: one more than the layer."""
        return [layer + 1 for layer in self.target_layer_ids]

    @property
    def architecture(self) -> str:
        """Name of its network in published configs."""
        if self.selector is None:
            return "DFlash2DraftModel" if self.conv_kernel_size else "DFlashDraftModel"
        if self.conv_kernel_size and self.selector.with_convolutions:
            return self.selector.with_convolutions
        return self.selector.architecture

    @property
    def method(self) -> str:
        """What vLLM and the schema of profiles call the way in which it drafts."""
        return "dspark" if self.architecture == "Qwen3DSparkModel" else "dflash"

    @property
    def network_keys(self) -> JsonObject:
        """What its layers and its selector add to `dflash_config`.

        Beside convolutions, engines want a selector; one of zeros changes nothing. llama.cpp wants its
        k (k + 1) <= hidden size.
        """
        keys = {name: getattr(self, name) for name in LAYER_SIZES if getattr(self, name)}
        if self.selector:
            return keys | self.selector.config_keys()
        if not self.conv_kernel_size:
            return keys
        top_k = next((k for k in (16, 8, 4) if k * (k + 1) <= self.hidden_size), 2)
        return {**keys, "selector_rank": 1, "selector_top_k": top_k}

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor of its network, by its published name.

        Raises:
            ValueError: sizes that no network has.
        """
        config = self.config()
        with translate_library_errors(WHAT, COPY_AGAIN), torch.device("meta"):  # takes no memory
            network = DFlashDraftModel(config)
        return {name: tensor.shape for name, tensor in network.state_dict().items()}

    @classmethod
    def from_values(cls, values: JsonObject) -> "DrafterSpec":
        """Make a spec from values under their published names; others are ignored, and None is a missing value.

        Raises:
            ValueError: a value that no drafter has, or none where one is needed; names it.
        """
        rope = values["rope_parameters"]
        numbers = read_values(Numbers, rope | read_group(values, "dpace"))
        objects: JsonObject = {"rope_parameters": rope | {"rope_theta": numbers.rope_theta}}
        selector = values.get("selector")
        if selector and values.get("sample_from_anchor") is None:
            objects["sample_from_anchor"] = selector.from_anchor
        spec = read_values(cls, values | objects)
        if spec.selector:
            spec.selector.check(spec.hidden_size)
            for key in spec.selector.refused:
                value = getattr(spec, key)
                if value != getattr(cls, key):
                    raise ValueError(
                        f"{key} is {value}, which dpace does not run with the selector {spec.selector.name}; take "
                        "another one, or serve this drafter with the project that trained it"
                    )
        # One spelling for layers without a window: files say it in several ways.
        if "sliding_attention" not in spec.layer_types:
            spec = replace(spec, layer_types=(), sliding_window=None)
        elif spec.sliding_window is None:
            raise ValueError(f"the drafter's config has sliding layers and no sliding_window; {COPY_AGAIN}")
        spec.config()  # refuses what transformers refuses
        return spec

    @classmethod
    def from_config(cls, config: JsonObject) -> "DrafterSpec":
        """Read a `config.json` in the published layout.

        The block size and the rotary embedding may have either spelling. A missing epsilon is transformers' default.

        Raises:
            ValueError: a value without a safe default is missing, a value is given twice and differently, a value that
                no drafter has, quantized weights, or a variant of the network that dpace does not support.
        """
        nested = read_group(config, "dflash_config")
        refuse_variants(config)
        if config.get("quantization_config"):
            raise ValueError("its weights are quantized in safetensors, which is not read; take the drafter in 16 bits")
        # The last three are defaults: the config's own values may stand in either place, and are read below.
        values = {"rms_norm_eps": 1e-6, **config, "block_size": 16, "target_layer_ids": (), "draft_vocab_size": 0}
        for name in LAYER_SIZES:
            values[name] = nested.get(name)
        for name in EITHER:
            value = read_either(config, nested, name)
            if value is not None:
                values[name] = value
        if values.get("sample_from_anchor") is None:
            values["sample_from_anchor"] = values.get(FROM_ANCHOR)
        # An own head with fewer rows is known by their number, and one with all rows by `has_own_lm_head`.
        if config.get("draft_vocab_size") not in (None, config.get("vocab_size")):
            values["draft_vocab_size"] = config["draft_vocab_size"]
            values["has_own_lm_head"] = False
        values["selector"] = read_sizes(config, nested | {"markov_rank": read_either(config, nested, "markov_rank")})
        values["rope_parameters"] = read_rope(config)
        values["is_causal"] = _read_causality(config, nested)
        spec = cls.from_values(values)
        if spec.target_layer_ids:
            return spec
        return replace(spec, target_layer_ids=tuple(build_target_layer_ids(spec.num_target_layers, spec.num_layers)))

    def config(self) -> Qwen3Config:
        """Make the config of a `Drafter`.

        Raises:
            ValueError: values that transformers refuses, or that give no rotation.
        """
        elsewhere = {*LAYER_SIZES, "selector"}
        values = adapter(DrafterSpec).dump_python(
            self, mode="json", by_alias=True, exclude_defaults=True, exclude=elsewhere
        )
        if self.selector and self.selector.from_anchor:
            # vLLM looks here. Its older versions read the last key.
            begins = self.sample_from_anchor
            values |= {"sample_from_anchor": begins, "markov_head_type": "vanilla", **self.selector.config_keys()}
            values["dspark_bonus_anchor"] = not begins
        # Some engines read these in `dflash_config`, and others at the top level, where they stay too.
        repeated = ("mask_token_id", "target_layer_ids", "sample_from_anchor", *SCALES)
        nested = {name: values[name] for name in repeated if name in values}
        values["layer_types"] = list(self.layer_types) or ["full_attention"] * self.num_layers
        values["use_sliding_window"] = self.sliding_window is not None
        # Engines let sliding layers alone be causal where nothing is said.
        values["is_causal"] = None if self.is_causal == "sliding" else self.is_causal
        with translate_library_errors(WHAT, COPY_AGAIN), torch.device("cpu"):  # also on paper
            config = Qwen3Config(
                **values,
                tie_word_embeddings=False,
                dflash_config=nested | self.network_keys,  # pyright: ignore[reportCallIssue]
            )
            # The last position finds a rotation that overflows, or whose numbers do not fit a head.
            cosines, _ = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.tensor([[self.max_position_embeddings]]))
            if cosines.shape[-1] != self.head_dim or not cosines.isfinite().all():
                raise ValueError(
                    f"rope_parameters {self.rope_parameters!r:.200} give no rotation of {self.head_dim} numbers"
                )
        return config

    def published(self, written: JsonObject) -> JsonObject:
        """Complete the `config.json` that transformers wrote with the values that engines read."""
        config = {
            **written,
            "architectures": [self.architecture],
            "auto_map": {"AutoModel": "modeling_dflash.DFlashDraftModel"},
            "rope_theta": self.rope_parameters["rope_theta"],
        }
        if self.rope_parameters["rope_type"] != "default":
            config["rope_scaling"] = self.rope_parameters
        return config

    def check(self) -> None:
        """Refuse a drafter that some engine cannot serve.

        Raises:
            ValueError: names the value, why it cannot be served and what to do.
        """
        if not are_servable(self.target_layer_ids, self.num_target_layers):
            raise ValueError(
                f"target_layer_ids is {list(self.target_layer_ids)} for a target of {self.num_target_layers} layers; "
                f"train with ascending ids in 0 .. {self.num_target_layers - 2}, because engines sort them, and give "
                "other values of the last layer"
            )
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


SAME_AS_OPTIONS = [name for name in DrafterSpec.__dataclass_fields__ if name in DrafterConfig.__dataclass_fields__]
"""Options of training that a spec has under the same names."""


def own_tables(names: Iterable[str]) -> dict[str, bool]:
    """Return what tensors of these names say in a config: which tables are the drafter's own."""
    return {f"has_own_{name}": f"{name}.weight" in names for name in ("embed_tokens", "lm_head")}


def _read_causality(config: JsonObject, nested: JsonObject) -> object:
    """Read `is_causal`; where the config does not say, sliding layers are causal, as in z-lab's code and vLLM."""
    is_causal = read_either({"causal": config.get("is_causal")}, nested, "causal")
    kinds = str(config.get("layer_types") or "")
    if not kinds and config.get("use_sliding_window"):
        raise ValueError(f"the drafter's config has use_sliding_window and no layer_types; {COPY_AGAIN}")
    if is_causal is not None or "sliding_attention" not in kinds:
        return is_causal
    return "sliding" if "full_attention" in kinds else True


def read_rope(config: JsonObject) -> JsonObject:
    """Read the rotary embedding from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    rope = read_group(config, "rope_parameters")
    if not rope:
        rope = read_group(config, "rope_scaling")
        rope.setdefault("rope_type", rope.pop("type", "default"))
    theta = read_either(config, rope, "rope_theta", "rope_parameters")
    if theta is None:
        raise ValueError(
            "the drafter's config has no rope_theta; add the target's value, or convert other layouts by `dpace import`"
        )
    if rope.get("rope_type", "default") == "default":  # where no other value counts
        rope = {"rope_type": "default"}
    return rope | {"rope_theta": theta}


def read_sizes(config: JsonObject, nested: JsonObject) -> SelectorSizes | None:
    """Read the sizes of a selector from a config and its `dflash_config`; None where they have none.

    Raises:
        ValueError: see `read_values`.
    """
    for name, sizes in SELECTORS.items():
        network = dpace.modeling_dflash.SELECTOR_NETWORKS[name]
        prefix = sizes.prefix
        # DSpark's layout may have rank 0, and then no head.
        is_named = sizes.architecture in str(config.get("architectures")) and nested.get(f"{prefix}rank") != 0
        if network.is_in(nested) or is_named:
            values = {key.removeprefix(prefix): value for key, value in nested.items() if key.startswith(prefix)}
            return read_values(sizes, values, prefix)
    return None


def published_name(name: str) -> str:
    """Return the name that this project writes for a tensor, which older files may call otherwise."""
    # Only a selector's network may have older names; its tensors begin with the selector's name.
    sizes = SELECTORS.get(name.partition(".")[0], SelectorSizes)
    for older, newer in sizes.older_names.items():
        name = name.replace(f".{older}.", f".{newer}.")
    return name


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a drafter's folder, also in shards.

    Raises:
        ValueError: damaged weights, or none in safetensors.
    """
    tensors = {}
    with translate_library_errors(f"the drafter {folder}", FIX):
        for file in sorted(folder.glob("model*.safetensors")):
            refuse_endless(file, "a file of weights")
            tensors |= {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    if not tensors:
        raise ValueError(f"the drafter {folder} has no model.safetensors, and pickles are not read; {FIX}")
    return tensors


def read_folder(
    folder: str | Path, to_published: Callable[[JsonObject], JsonObject] = dict
) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Read a z-lab or SpecForge folder.

    Args:
        folder: of the drafter.
        to_published: turns another layout's config into the published one.

    Returns:
        The spec, and the weights as they are in the files.

    Raises:
        ValueError: no such folder, or a config or tensors that this project does not know.
    """
    folder = Path(folder)
    if (folder / "mask_embedding.pt").exists():
        raise ValueError(
            f"{folder} has a mask embedding of its own (mask_embedding.pt), a pickle, which dpace does not open; write "
            "the target's embedding with this row at mask_token_id into model.safetensors, as embed_tokens.weight"
        )
    config = read_config(folder)
    tensors = read_tensors(folder)
    try:
        spec = DrafterSpec.from_config(own_tables(tensors) | to_published(config))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return spec, tensors
