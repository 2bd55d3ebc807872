"""A drafter's folder beside its target: what the files hold, and what they should hold.

What comes in is what `dpace.engines.folder` read, and a target. What goes out is compared by `dpace.doctor.checks`: the
config as it is and as dpace would write it for these tensors, what training recorded, the drafter and its tau.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dpace.batches.dataset import ResponseDataset
from dpace.config import Engine
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.drafter import attention_of, spec_for
from dpace.drafter.lilicorr import HeadSpec, count_head_layers, head_for
from dpace.drafter.spec import DrafterSpec
from dpace.engines.folder import DrafterFolder, mapping
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance
from dpace.respond.responses import Response
from dpace.system.device import dtype_name
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes

MAX_RESPONSES = 8
"""Number of responses that tau is measured on where training has not recorded which."""
ABSENT = "absent"
NAMES_IN_SPEC = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """Return the value of a key, or of `group.key`; `ABSENT` where there is none."""
    *groups, key = path.split(".")
    for group in groups:
        config = mapping(config.get(group))
    return config.get(key, ABSENT)


def _rope_of(values: object) -> dict[str, Any]:
    """Return a rotary embedding under the names of `rope_parameters`; empty where there is none."""
    rope = {name: value for name, value in mapping(values).items() if name != "partial_rotary_factor"}
    kind = rope.pop("type", "default")
    return {"rope_type": kind, **rope} if rope else {}


@dataclass
class ExaminedFolder(DrafterFolder):
    """A drafter's folder, and what it is compared with."""

    target: Target
    engine: Engine | None
    responses: list[Response]

    @cached_property
    def measured(self) -> dict[str, int | None]:
        """Keys that the tensors decide, as they have them; None where they do not agree."""
        head = self.size("head")
        counts = {axis: (self.size(axis) or 0) // head if head else 0 for axis in ("query", "key")}
        return {
            "num_hidden_layers": self.num_layers or None,
            "num_attention_heads": counts["query"] or None,
            "num_key_value_heads": counts["key"] or None,
            "head_dim": head,
            "intermediate_size": self.size("inner"),
        }

    @property
    def attention(self) -> dict[str, Any]:
        """Windows and causality as the recipe has them, or else the config: no tensor depends on them."""
        options = mapping(self.recipe.get("drafter"))
        if "causal" in options:
            return attention_of(**options)
        try:
            spec = DrafterSpec.from_config(self.config)
        except ValueError:  # other checks name what is wrong
            return {}
        return {name: getattr(spec, name) for name in ("sliding_window", "layer_types", "is_causal")}

    @cached_property
    def expected_spec(self) -> DrafterSpec:
        """The drafter with these tensors for this target; the config decides sizes on which the tensors differ."""
        taps = self.size("tap") or 0
        spec = spec_for(
            self.target,
            num_layers=1,
            block_size=2,
            mask_token_id=0,
            target_layer_ids=(0,),
            conv_kernel_size=taps,
            head=self.expected_head,
            **self.attention,
        )
        for key, measured in self.measured.items():
            size = measured or (self.config.get(key) if key != "head_dim" else None)
            if type(size) is int and size > 0:
                spec = replace(spec, **{NAMES_IN_SPEC.get(key, key): size})
        groups = self.size("kernel")
        return replace(spec, conv_group_size=2 * taps * spec.hidden_size // groups) if taps and groups else spec

    @property
    def expected_head(self) -> HeadSpec | None:
        """The sizes of the head with these tensors; constants that no tensor has are the config's or published."""
        width = self.size("correlator")
        if not width:
            return None
        hidden_size = self.target.hidden_size
        values: dict[str, Any] = {name: self.nested.get(f"lilicorr_{name}") for name in ("vector_eps", "logit_scale")}
        return replace(
            head_for(hidden_size, self.size("candidate") or 1),
            hidden_size=0 if width == hidden_size != self.nested.get("lilicorr_hidden_size") else width,
            num_heads=self.size("heads") or 1,
            factor_dim=self.size("factor") or 1,
            num_layers=count_head_layers(self.tensors),
            mlp_ratio=(self.size("wide") or width) / width,
            **{name: float(value) for name, value in values.items() if type(value) in (int, float)},
        )

    @cached_property
    def expected_config(self) -> dict[str, Any]:
        """The config that dpace would write for it; None where the tensors do not say."""
        spec = self.expected_spec
        config = spec.published(spec.config().to_dict())
        unknown = {key: None for key, size in self.measured.items() if key != "head_dim" and size is None}
        return config | unknown | ({"layer_types": None} if "num_hidden_layers" in unknown else {})

    @cached_property
    def expected_axes(self) -> dict[str, int]:
        """Length of each axis of the tensors, as most of them have it."""
        spec = self.expected_spec
        expected = {axis: self.size(axis) or length for axis, length in spec.axis_sizes.items()}
        return expected | {"hidden": self.target.hidden_size}

    @property
    def old_rope(self) -> dict[str, Any]:
        """The rotary embedding by `rope_theta` and `rope_scaling`; empty without `rope_theta`."""
        theta = self.config.get("rope_theta")
        return {} if theta is None else {"rope_theta": theta} | _rope_of(self.config.get("rope_scaling"))

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding by `rope_parameters`, or else by the old spelling."""
        return _rope_of(self.config.get("rope_parameters")) or {"rope_type": "default", **self.old_rope}

    @property
    def expected_rope(self) -> dict[str, Any]:
        """The target's rotary embedding."""
        return _rope_of(self.expected_spec.rope)

    @property
    def trained(self) -> dict[str, Any]:
        """Keys of DFlash as the recipe has them."""
        options = self.recipe["drafter"]
        return {"block_size": options["block_size"], "target_layer_ids": Drafter.layer_ids(self.target, **options)}

    @cached_property
    def facts(self) -> dict[str, object]:
        """What training would record today about the target."""
        return {
            "target": self.target.short_name,
            "dtype": dtype_name(self.target.model.dtype),
            "thinking": self.target.thinking,
            **tokenizer_hashes(self.target),
        }

    @cached_property
    def stored_dtypes(self) -> list[str]:
        """Names of the dtypes of the tensors."""
        return sorted({dtype_name(tensor.dtype) for tensor in self.tensors.values() if tensor.is_floating_point()})

    @cached_property
    def drafter(self) -> Drafter:
        """The drafter, loaded as for decoding."""
        try:
            return load_drafter(self.path, self.target)
        except Exception as error:  # transformers and torch share no narrower class for a folder that they refuse
            raise ValueError(str(error)) from error

    @cached_property
    def acceptance(self) -> Acceptance | None:
        """Accepted lengths on the recorded responses, or on the first ones; None without responses."""
        return self._measure()

    @cached_property
    def shifted_acceptance(self) -> Acceptance | None:
        """The same with drafts read from the slots before: as if blocks began at the anchor, or else as if not."""
        published = self.drafter.config.dflash_config
        published["sample_from_anchor"] = self.drafter.first_slot == 1
        try:
            return self._measure()
        finally:
            published["sample_from_anchor"] = self.drafter.first_slot == 1

    def _measure(self) -> Acceptance | None:
        chosen = [r for r in self.responses if r.id in self.record.get("tau_responses", ())]
        longest = mapping(self.recipe.get("train")).get("max_length", 10**9)
        chosen = chosen or self.responses[:MAX_RESPONSES]
        dataset = ResponseDataset(chosen, max_length=longest, num_anchors=None, seed=0)
        return heldout_acceptance(self.drafter, self.target, dataset) if len(dataset) else None
