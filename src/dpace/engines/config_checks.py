"""A drafter's folder against the published layout and its target: one named check for each way in which serving goes wrong."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpace.blocks import build_target_layer_ids
from dpace.config import Engine
from dpace.data.dataset import ResponseDataset
from dpace.data.responses import Response, tokenizer_hashes
from dpace.drafter import Drafter, check_mask_token, load_drafter, rope_of
from dpace.engines.folder import DrafterFolder, mapping, published_name
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance
from dpace.target import Target

SHARED = {"embed_tokens.weight": "the embedding", "lm_head.weight": "the LM head"}
SCALES = ("final_logit_softcapping", "input_embedding_scale", "output_multiplier")
MAX_MATRIX_RMS = 1.0
"""Root mean square of a matrix's entries; 0.02 when training starts, and little more after a short one."""
MAX_NORM_RMS = 1000.0
"""The same for the weights of a norm, which start near 1 and may grow much."""
MAX_RESPONSES = 8
"""Responses that tau is measured on where training has not recorded which."""


class Seen(NamedTuple):
    """What a check looked at."""

    is_right: bool | None
    """None where it cannot be told; `found` then says why."""
    found: object
    expected: object = ""


@dataclass
class Case(DrafterFolder):
    """A folder, and what it is compared with."""

    target: Target
    engine: Engine | None
    responses: list[Response]

    @cached_property
    def facts(self) -> dict[str, object]:
        """What training would record today."""
        return {
            "target": self.target.short_name,
            "dtype": str(self.target.model.dtype).removeprefix("torch."),
            "thinking": self.target.thinking,
            **tokenizer_hashes(self.target),
        }

    @cached_property
    def drafter(self) -> Drafter:
        """Loaded as for decoding."""
        try:
            return load_drafter(self.path, self.target)
        except Exception as error:  # transformers and torch share no narrower class for a folder that they refuse
            raise ValueError(str(error)) from error

    @cached_property
    def acceptance(self) -> Acceptance | None:
        """On the recorded responses, or on the first ones; None without any."""
        chosen = [r for r in self.responses if r.id in self.record.get("tau_responses", ())]
        longest = mapping(self.recipe.get("train")).get("max_length", 10**9)
        chosen = chosen or self.responses[:MAX_RESPONSES]
        dataset = ResponseDataset(chosen, max_length=longest, num_anchors=None, seed=0)
        return heldout_acceptance(self.drafter, self.target, dataset) if len(dataset) else None


Look = Callable[[Case], Seen | None]
"""None: the check does not apply to this folder, and is not listed."""


class Check(NamedTuple):
    """A named check."""

    name: str
    severity: Literal["fails", "warns"]
    look: Look
    fix: str


def some(names: Sequence[str]) -> str:
    """A list that stays short."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _none_of(names: Sequence[str]) -> Seen:
    return Seen(not names, some(names) or "none", "none")


def _key(name: str, expected: Callable[[Case], object]) -> Look:
    """A key at the top level with a known value."""
    return lambda case: Seen(case.config.get(name) == expected(case), case.config.get(name, "absent"), expected(case))


def _written(name: str) -> Look:
    """A key at the top level, whatever its value."""
    return lambda case: Seen(name in case.config, case.config.get(name, "absent"), "written")


def _size(name: str, axis: str, factor: str | None = None) -> Look:
    """A key that gives the length of an axis of the tensors, times head_dim where `factor` says so."""

    def look(case: Case) -> Seen:
        measured, unit = case.size(axis), case.size(factor) if factor else 1
        if measured is None or unit is None:
            return Seen(None, "the tensors do not agree on it")
        return Seen(case.config.get(name) == measured / unit, case.config.get(name, "absent"), measured // unit)

    return look


def _file(name: str, expected: str) -> Look:
    return lambda case: Seen(name not in case.problems, case.problems.get(name, name), expected)


def _agree(name: str) -> Look:
    """A key that stands at the top level and nested."""

    def look(case: Case) -> Seen | None:
        if name not in case.config or name not in case.nested:
            return None
        top, nested = case.config[name], case.nested[name]
        return Seen(top == nested, f"top level {top}, in dflash_config {nested}", "equal")

    return look


def _recorded(name: str) -> Look:
    """A fact that training recorded against the same fact today."""

    def look(case: Case) -> Seen:
        before, now = case.record.get(name, ""), case.facts.get(name, "")
        if "" in (before, now):
            return Seen(None, "not recorded by the training" if before == "" else "the target does not say")
        return Seen(before == now, str(now)[:24], f"{str(before)[:24]}, as in training")

    return look


def _head_dim(case: Case) -> Seen:
    theirs = case.target.config
    expected = case.size("head") or getattr(theirs, "head_dim", None)
    expected = expected or theirs.hidden_size // theirs.num_attention_heads
    return Seen(case.config.get("head_dim") == expected, case.config.get("head_dim", "absent (128)"), expected)


def _hidden_size(case: Case) -> Seen:
    found, expected = case.config.get("hidden_size", "absent"), case.target.hidden_size
    measured = case.size("hidden") or expected
    return Seen(found == measured == expected, f"{found}, in the tensors {measured}", f"{expected}, the target's")


def _architecture(case: Case) -> Seen:
    found = [case.config.get("architectures"), case.config.get("model_type")]
    if "speculators_model_type" in case.config:
        return Seen(False, "the layout of speculators", "the published layout")
    expected = [["DFlashDraftModel"], "qwen3"]
    return Seen(found == expected, f"{found[0]}, {found[1]}", f"{expected[0]}, {expected[1]}")


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """How a rotary embedding is stretched, in today's words."""
    others = {k: v for k, v in rope.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    return {"rope_type": rope.get("type", "default"), **others}


def _rope_theta(case: Case) -> Seen:
    found, expected = case.rope.get("rope_theta"), rope_of(case.target.config)["rope_theta"]
    return Seen(found == expected, "absent (10000)" if found is None else found, expected)


def _rope_scaling(case: Case) -> Seen:
    found, expected = _scaling(case.rope), _scaling(rope_of(case.target.config))
    return Seen(found == expected, found, expected)


def _rope_spellings(case: Case) -> Seen:
    missing = [key for key in ("rope_parameters", "rope_theta") if case.config.get(key) is None]
    if _scaling(case.rope) != {"rope_type": "default"} and not case.config.get("rope_scaling"):
        missing.append("rope_scaling")
    return Seen(not missing, f"without {some(missing)}" if missing else "both", "rope_parameters and rope_theta")


def _rope_agreement(case: Case) -> Seen | None:
    old, new = case.config.get("rope_theta"), mapping(case.config.get("rope_parameters")).get("rope_theta")
    if None in (old, new):
        return None
    scaling = _scaling(mapping(case.config.get("rope_scaling")) or case.rope)
    is_equal = old == new and scaling == _scaling(case.rope)
    return Seen(is_equal, f"old theta {old:g}, {scaling}; new {new:g}, {_scaling(case.rope)}", "equal")


def _rope_layout(case: Case) -> Seen:
    odd = {key: case.config.get(key, case.rope.get(key)) for key in ("rope_interleaved", "partial_rotary_factor")}
    odd = {key: value for key, value in odd.items() if value is True or value not in (None, False, 1.0)}
    return Seen(not odd, odd or "halves of whole heads", "halves of whole heads")


def _nested(case: Case) -> Seen:
    missing = [key for key in ("target_layer_ids", "mask_token_id") if key not in case.nested]
    return Seen(not missing, f"without {some(missing)}" if missing else "complete", "target_layer_ids, mask_token_id")


def _num_layers(case: Case) -> Seen | None:
    found = case.config.get("num_hidden_layers", "absent")
    return Seen(found == case.num_layers, found, case.num_layers) if case.tensors else None


def _layer_order(case: Case) -> Seen:
    ids = case.value("target_layer_ids")
    is_right = bool(ids) and all(type(i) is int for i in ids) and ids == sorted(set(ids))
    return Seen(is_right, ids, "ascending whole numbers, each once")


def _layer_range(case: Case) -> Seen:
    ids, number = case.value("target_layer_ids"), case.target.num_layers
    return Seen(all(0 <= i < number for i in ids), ids, f"in 0 .. {number - 2}")


def _last_layer(case: Case) -> Seen:
    ids, last = case.value("target_layer_ids"), case.target.num_layers - 1
    return Seen(last not in ids, ids, f"without {last}")


def _trained_ids(case: Case) -> list[int]:
    options = case.recipe["drafter"]
    number = options["num_features"] or options["num_layers"]
    return list(options["target_layer_ids"] or build_target_layer_ids(case.target.num_layers, number))


def _layer_offset(case: Case) -> Seen | None:
    ids = case.value("target_layer_ids")
    if "drafter" in case.recipe and ids == _trained_ids(case):
        return None
    rule = build_target_layer_ids(case.target.num_layers, len(ids))
    is_shifted = any(ids == [i + step for i in rule] for step in (-1, 1))
    return Seen(not is_shifted, ids, f"{rule} by the published rule, or ids that are not those shifted by one")


def _as_trained(name: str, trained: Callable[[Case], object]) -> Look:
    """A key of DFlash against the recipe beside the drafter."""

    def look(case: Case) -> Seen | None:
        if "drafter" not in case.recipe:
            return None
        return Seen(case.value(name) == trained(case), case.value(name), f"{trained(case)} in recipe.yaml")

    return look


def _fc_columns(case: Case) -> Seen:
    columns, hidden = case.size("feature"), case.size("hidden") or case.config.get("hidden_size")
    if columns is None or not hidden:
        return Seen(None, "no fc.weight to measure")
    number = len(case.value("target_layer_ids"))
    return Seen(columns == number * hidden, f"{number} layer ids, fc for {columns / hidden:g}", "as many as fc takes")


def _mask_token(case: Case) -> Seen:
    check_mask_token(case.value("mask_token_id"), case.target)
    return Seen(True, case.value("mask_token_id"))


def _mask_file(case: Case) -> Seen:
    return _none_of([path.name for path in case.path.glob("mask_embedding.pt")])


def _block_size(case: Case) -> Seen:
    found = case.value("block_size")
    return Seen(type(found) is int and found >= 2, "absent (16)" if found is None else found, "2 or more")


def _trained_size(case: Case) -> int:
    return case.recipe["drafter"]["block_size"]


def _is_causal(case: Case) -> Seen:
    found = [case.config.get("is_causal"), case.nested.get("causal"), case.nested.get("is_causal")]
    return Seen(not any(found), next((x for x in found if x), "false"), "false")


def _layer_types(case: Case) -> Seen:
    found, numbers = case.config.get("layer_types", "absent"), (case.config.get("num_hidden_layers"), case.num_layers)
    is_right = isinstance(found, list) and set(found) == {"full_attention"} and len(found) in numbers
    return Seen(is_right, found, f"{numbers[0]} full_attention")


def _sliding_window(case: Case) -> Seen:
    found = {key: case.config.get(key) for key in ("use_sliding_window", "sliding_window")}
    return Seen(not any(found.values()), json.dumps(found), "false and null")


def _scale(name: str, default: float | None, theirs: Callable[[Target], float | None]) -> Look:
    """A key of how embedding and logits are scaled, against what the target does; rounding in bf16 is allowed for."""

    def look(case: Case) -> Seen:
        found, expected = case.config.get(name, default), theirs(case.target)
        is_equal = found == expected or (None not in (found, expected) and abs(found / expected - 1) < 1e-2)
        return Seen(is_equal, "absent" if found is None else found, "absent" if expected is None else expected)

    return look


def _shared(case: Case) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in case.tensors.items() if name in SHARED}


def _own_embedding(case: Case) -> Seen | None:
    embedding = case.target.model.get_input_embeddings().weight
    tables = {"embed_tokens.weight": embedding, "lm_head.weight": case.target.head.weight}
    other = [
        f"{SHARED[name]} differs"
        for name, found in _shared(case).items()
        if (table := tables[name]).shape != found.shape or not torch.allclose(table.to(found), found, rtol=1e-2)
    ]
    return Seen(not other, some(other) or "equal", "the target's, or not stored") if _shared(case) else None


def _stored_embedding(case: Case) -> Seen:
    return _none_of([SHARED[name] for name in _shared(case)])


def _engine(case: Case) -> Seen | None:
    if case.engine != "vllm":
        return None
    return _none_of([key for key in SCALES if key in case.config])


def _dtype(case: Case) -> Seen | None:
    if not case.config:
        return None
    found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in case.tensors.values()})
    said = case.config.get("dtype", case.config.get("torch_dtype"))
    return Seen(found == [said], f"{' and '.join(found)}, config {said}", "one dtype, and the config's")


def _names(case: Case) -> Seen:
    return _none_of(sorted(name for name in case.stored if name != published_name(name)))


def _missing(case: Case) -> Seen:
    return _none_of(sorted(set(case.axes) - set(case.tensors)))


def _extra(case: Case) -> Seen:
    return _none_of(sorted(set(case.tensors) - set(case.axes) - set(SHARED)))


def _tensor_shapes(case: Case) -> Seen:
    config = case.config
    head = case.size("head") or config.get("head_dim", 0)
    by_config = {
        "hidden": case.target.hidden_size,
        "query": config.get("num_attention_heads", 0) * head,
        "key": config.get("num_key_value_heads", 0) * head,
        "head": head,
        "inner": config.get("intermediate_size", 0),
    }
    by_config["feature"] = len(case.value("target_layer_ids") or ()) * by_config["hidden"]
    expected = {axis: case.size(axis) or length for axis, length in by_config.items()}
    wrong = [
        f"{name} {list(case.tensors[name].shape)}, not {[expected[axis] for axis in axes]}"
        for name, axes in case.axes.items()
        if name in case.tensors and list(case.tensors[name].shape) != [expected[axis] for axis in axes]
    ]
    return _none_of(wrong)


def _finite(case: Case) -> Seen:
    return _none_of([name for name, tensor in case.tensors.items() if not tensor.isfinite().all()])


def _zero(case: Case) -> Seen:
    return _none_of([name for name, tensor in case.tensors.items() if not tensor.any()])


def _exploded(case: Case) -> Seen:
    limits = {1: MAX_NORM_RMS, 2: MAX_MATRIX_RMS}
    sizes = {name: float(t.float().square().mean().sqrt()) for name, t in case.tensors.items() if name not in SHARED}
    return _none_of([f"{n} {x:.3g}" for n, x in sizes.items() if limits.get(case.tensors[n].dim(), x) < x < math.inf])


DAMAGED = "copy or export the drafter again"
BOTH = "make both equal: engines differ in which they read"
MEASURED = "write what the tensors have"
THEIRS = "write the target's, or take the drafter of this target"

FILES = (
    Check("config readable", "fails", _file("config.json", "a JSON object"), DAMAGED),
    Check("weights readable", "fails", _file("model.safetensors", "safetensors"), DAMAGED),
    Check("recipe readable", "warns", _file("recipe.yaml", "YAML, or no file"), "copy it again, or delete it"),
)
CONFIG = (
    Check("architecture", "fails", _architecture, "write those; other layouts go through `dpace import`"),
    Check("hidden_act", "fails", _key("hidden_act", lambda _: "silu"), "write silu, the layout's only one"),
    Check("attention_bias", "fails", _key("attention_bias", lambda _: False), "write false: no bias is stored"),
    Check("rms_norm_eps", "warns", _written("rms_norm_eps"), "write it: the default of engines is 1e-6"),
    Check("rope theta", "fails", _rope_theta, "write the target's in rope_parameters and at the top level"),
    Check("rope scaling", "fails", _rope_scaling, "write the target's in rope_parameters and rope_scaling"),
    Check("rope spellings", "warns", _rope_spellings, "write all: some engines read one and assume 10000 without it"),
    Check("rope agreement", "fails", _rope_agreement, BOTH),
    Check("rope layout", "fails", _rope_layout, "remove these keys: the layout rotates halves of whole heads"),
    Check("head_dim", "fails", _head_dim, "write it: engines assume 128 without it"),
    Check("num_attention_heads", "fails", _size("num_attention_heads", "query", "head"), MEASURED),
    Check("num_key_value_heads", "fails", _size("num_key_value_heads", "key", "head"), MEASURED),
    Check("intermediate_size", "fails", _size("intermediate_size", "inner"), MEASURED),
    Check("num_hidden_layers", "fails", _num_layers, "write what the tensors have, or copy the weights again"),
    Check("hidden_size", "fails", _hidden_size, THEIRS),
    Check("vocab_size", "fails", _key("vocab_size", lambda case: len(case.target.head.weight)), THEIRS),
    Check("num_target_layers", "fails", _key("num_target_layers", lambda case: case.target.num_layers), THEIRS),
    Check("dflash_config", "fails", _nested, "write them there: vLLM reads nothing else and takes other layers"),
    Check("layer ids agree", "fails", _agree("target_layer_ids"), BOTH),
    Check("layer ids order", "fails", _layer_order, "sort them with the columns of fc: vLLM sorts the ids alone"),
    Check("layer ids range", "fails", _layer_range, "name layers of the target, counted from 0"),
    Check("last layer", "fails", _last_layer, "train without it: some engines normalize its output, others abort"),
    Check(
        "layer ids offset", "warns", _layer_offset, "undo the shift: speculators and GGUF write i + 1, this layout i"
    ),
    Check("layer ids as trained", "fails", _as_trained("target_layer_ids", _trained_ids), "write the training's"),
    Check("fc columns", "fails", _fc_columns, "name the layers of the training, in its order"),
    Check("mask token", "fails", _mask_token, "write the training's; if it is this one, train again"),
    Check("mask tokens agree", "fails", _agree("mask_token_id"), BOTH),
    Check("mask_embedding.pt", "warns", _mask_file, "remove it: vLLM, SGLang and llama.cpp read it, others do not"),
    Check("block_size", "fails", _block_size, "write the training's: the anchor and the draft slots"),
    Check("block_size written", "warns", _written("block_size"), "write it at the top level: SpecForge reads no other"),
    Check("block sizes agree", "fails", _agree("block_size"), BOTH),
    Check(
        "block_size as trained", "fails", _as_trained("block_size", _trained_size), "write the training's: drafts + 1"
    ),
    Check("is_causal", "fails", _is_causal, "write false: the slots of a block see each other"),
    Check("is_causal written", "warns", _written("is_causal"), "write false: engines differ in what they assume"),
    Check("layer_types", "fails", _layer_types, "write full_attention for every layer"),
    Check("sliding window", "warns", _sliding_window, "write these: full attention has no window"),
    Check("tie_word_embeddings", "fails", _key("tie_word_embeddings", lambda _: False), "write false: nothing is tied"),
    Check(SCALES[0], "fails", _scale(SCALES[0], None, lambda target: target.head.softcap), THEIRS),
    Check(SCALES[1], "fails", _scale(SCALES[1], 1.0, lambda target: target.embed_scale), THEIRS),
    Check(SCALES[2], "fails", _scale(SCALES[2], 1.0, lambda target: target.head.multiplier), THEIRS),
    Check("engine", "warns", _engine, "vLLM's V1 runner does not read these keys: use another engine"),
    Check("target", "warns", _recorded("target"), "name the target of the training, base or instruct as it was"),
    Check("target dtype", "warns", _recorded("dtype"), "expect slightly other accepted lengths"),
    Check("tokenizer", "fails", _recorded("tokenizer_sha256"), "use the tokenizer of the training"),
    Check(
        "chat template", "warns", _recorded("chat_template_sha256"), "use the training's, or train on such responses"
    ),
    Check(
        "thinking", "warns", _recorded("thinking"), "serve as in training (here --thinking), or train on such responses"
    ),
)
WEIGHTS = (
    Check("dtype", "warns", _dtype, "write the tensors' dtype in the config"),
    Check(
        "tensor names", "fails", _names, "rename them with `dpace import`: most engines know the published ones only"
    ),
    Check("missing tensors", "fails", _missing, DAMAGED),
    Check("extra tensors", "warns", _extra, "remove them: some engines refuse what they do not know"),
    Check("own embedding", "fails", _own_embedding, "remove it: an engine that reads it drafts with the wrong table"),
    Check("stored embedding", "warns", _stored_embedding, "remove it: engines share the target's"),
    Check("tensor shapes", "fails", _tensor_shapes, "copy or export again: swapped, turned or of another drafter"),
    Check("finite", "fails", _finite, "take an earlier checkpoint; train with a lower learning rate"),
    Check("zero tensors", "fails", _zero, DAMAGED),
    Check("exploded tensors", "warns", _exploded, "take an earlier checkpoint; train with a lower learning rate"),
)
