"""The checks of a drafter's config.json against the published layout and its target.

What the checks of a drafter's config.json look at.

Checks of a drafter's weights: names, shapes and values.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpace.blocks import build_target_layer_ids
from dpace.doctor.subject import Check, Observation, Probe, Subject, none_of, some
from dpace.drafter.mask_token import check_mask_token
from dpace.drafter.spec import LayerIdFault, find_layer_id_faults
from dpace.engines.folder import SELECTOR_TENSORS, mapping, published_name
from dpace.target import Target
from dpace.target.probe import rope_of

FIX_COPY_AGAIN = "copy or export the drafter again"
FIX_MAKE_EQUAL = "make both equal: some engines read one, some the other"
FIX_WRITE_TENSORS = "write the number that the tensors have"
FIX_USE_TARGETS = "write the target's value, or take a drafter that was trained for this target"
SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_size",
)
"""Checks of what decides how large the network is."""


SCALES = ("final_logit_softcapping", "input_embedding_scale", "output_multiplier")


def equals(name: str, expected: Callable[[Subject], object]) -> Probe:
    """Compare a key at the top level with a known value."""
    return lambda subject: Observation(
        subject.config.get(name) == expected(subject), subject.config.get(name, "absent"), expected(subject)
    )


def written(name: str) -> Probe:
    """Look for a key at the top level, whatever its value."""
    return lambda subject: Observation(name in subject.config, subject.config.get(name, "absent"), "written")


def size(name: str, axis: str, factor: str | None = None) -> Probe:
    """Compare a key with the length of an axis of the tensors.

    Where `factor` names another axis, the key counts its lengths: heads of head_dim each.
    """

    def look(subject: Subject) -> Observation:
        measured, unit = subject.size(axis), subject.size(factor) if factor else 1
        if measured is None or unit is None:
            return Observation(None, "the tensors have different lengths")
        return Observation(
            subject.config.get(name) == measured / unit, subject.config.get(name, "absent"), measured // unit
        )

    return look


def file(name: str, expected: str) -> Probe:
    """Say whether a file could be read."""
    return lambda subject: Observation(name not in subject.problems, subject.problems.get(name, name), expected)


def agreement(name: str) -> Probe:
    """Compare a key at the top level with the same key in `dflash_config`."""

    def look(subject: Subject) -> Observation | None:
        if name not in subject.config or name not in subject.nested:
            return None
        top, nested = subject.config[name], subject.nested[name]
        return Observation(top == nested, f"top level {top}, in dflash_config {nested}", "equal")

    return look


def recorded(name: str) -> Probe:
    """Compare a fact that training recorded with the same fact today."""

    def look(subject: Subject) -> Observation:
        before, now = subject.record.get(name, ""), subject.facts.get(name, "")
        if "" in (before, now):
            return Observation(None, "training did not record it" if before == "" else "the target does not say")
        return Observation(before == now, str(now)[:24], f"{str(before)[:24]} as in training")

    return look


def head_dim(subject: Subject) -> Observation:
    """Compare head_dim with the tensors, or with the target where they do not say."""
    theirs = subject.target.config
    expected = subject.size("head") or getattr(theirs, "head_dim", None)
    expected = expected or theirs.hidden_size // theirs.num_attention_heads
    return Observation(
        subject.config.get("head_dim") == expected, subject.config.get("head_dim", "absent (128)"), expected
    )


def hidden_size(subject: Subject) -> Observation:
    """Compare the hidden size with the tensors and with the target."""
    found, expected = subject.config.get("hidden_size", "absent"), subject.target.hidden_size
    measured = subject.size("hidden") or expected
    return Observation(
        found == measured == expected, f"{found}, in the tensors {measured}", f"{expected} as the target"
    )


def architecture(subject: Subject) -> Observation:
    """Look at the class and the model type."""
    found = [subject.config.get("architectures"), subject.config.get("model_type")]
    if "speculators_model_type" in subject.config:
        return Observation(False, "the layout of speculators", "the published layout")
    expected = [["DFlash2DraftModel" if subject.has_convolutions else "DFlashDraftModel"], "qwen3"]
    return Observation(found == expected, f"{found[0]}, {found[1]}", f"{expected[0]}, {expected[1]}")


def convolutions(subject: Subject) -> Observation | None:
    """Compare the sizes of convolutions with those of the tensors."""
    if not subject.has_convolutions:
        return None
    found = [subject.nested.get("conv_kernel_size"), subject.nested.get("conv_group_size")]
    taps, width, kernels = (subject.size(axis) or 0 for axis in ("tap", "hidden", "kernel"))
    expected = [taps, 2 * taps * width // max(1, kernels)]
    return Observation(found == expected, found, expected)


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Give the scaling of a rotary embedding under the names of `rope_parameters`."""
    others = {k: v for k, v in rope.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    return {"rope_type": rope.get("type", "default"), **others}


def rope_theta(subject: Subject) -> Observation:
    """Compare the base of the rotary embedding with the target's."""
    found, expected = subject.rope.get("rope_theta"), rope_of(subject.target.config)["rope_theta"]
    return Observation(found == expected, "absent (10000)" if found is None else found, expected)


def rope_scaling(subject: Subject) -> Observation:
    """Compare the scaling of the rotary embedding with the target's."""
    found, expected = _scaling(subject.rope), _scaling(rope_of(subject.target.config))
    return Observation(found == expected, found, expected)


def rope_spellings(subject: Subject) -> Observation:
    """Look for both spellings of the rotary embedding, since some engines read only one."""
    missing = [key for key in ("rope_parameters", "rope_theta") if subject.config.get(key) is None]
    if _scaling(subject.rope) != {"rope_type": "default"} and not subject.config.get("rope_scaling"):
        missing.append("rope_scaling")
    return Observation(not missing, f"without {some(missing)}" if missing else "both", "rope_parameters and rope_theta")


def rope_agreement(subject: Subject) -> Observation | None:
    """Compare both spellings of the rotary embedding."""
    old, new = subject.config.get("rope_theta"), mapping(subject.config.get("rope_parameters")).get("rope_theta")
    if None in (old, new):
        return None
    scaling = _scaling(mapping(subject.config.get("rope_scaling")) or subject.rope)
    is_equal = old == new and scaling == _scaling(subject.rope)
    return Observation(is_equal, f"old theta {old:g}, {scaling}; new {new:g}, {_scaling(subject.rope)}", "equal")


def rope_layout(subject: Subject) -> Observation:
    """Look for keys that rotate anything but halves of whole heads."""
    odd = {key: subject.config.get(key, subject.rope.get(key)) for key in ("rope_interleaved", "partial_rotary_factor")}
    odd = {key: value for key, value in odd.items() if value is True or value not in (None, False, 1.0)}
    return Observation(not odd, odd or "halves of whole heads", "halves of whole heads")


def nested(subject: Subject) -> Observation:
    """Look for the keys that vLLM reads in `dflash_config` only."""
    missing = [key for key in ("target_layer_ids", "mask_token_id") if key not in subject.nested]
    return Observation(
        not missing, f"without {some(missing)}" if missing else "complete", "target_layer_ids, mask_token_id"
    )


def num_layers(subject: Subject) -> Observation | None:
    """Compare the number of layers with the tensors."""
    found = subject.config.get("num_hidden_layers", "absent")
    return Observation(found == subject.num_layers, found, subject.num_layers) if subject.tensors else None


def layer_ids(fault: LayerIdFault, expected: str) -> Probe:
    """Look for one fault that `find_layer_id_faults` knows.

    `{last}` in `expected` stands for the target's last layer, `{before}` for the layer before it.
    """

    def probe(subject: Subject) -> Observation:
        ids, number = subject.value("target_layer_ids"), subject.target.num_layers
        faults = find_layer_id_faults(ids, number)
        return Observation(fault not in faults, ids, expected.format(last=number - 1, before=number - 2))

    return probe


def trained_ids(subject: Subject) -> list[int]:
    """Give the layer ids that the recipe stands for."""
    options = subject.recipe["drafter"]
    number = options["num_features"] or options["num_layers"]
    return list(options["target_layer_ids"] or build_target_layer_ids(subject.target.num_layers, number))


def layer_offset(subject: Subject) -> Observation | None:
    """Look for ids that are the published rule's, shifted by one."""
    ids = subject.value("target_layer_ids")
    if "drafter" in subject.recipe and ids == trained_ids(subject):
        return None
    rule = build_target_layer_ids(subject.target.num_layers, len(ids))
    is_shifted = any(ids == [i + step for i in rule] for step in (-1, 1))
    return Observation(not is_shifted, ids, f"{rule} (the published rule), or ids that are not these shifted by one")


def as_trained(name: str, trained: Callable[[Subject], object]) -> Probe:
    """Compare a key of DFlash with the recipe beside the drafter."""

    def look(subject: Subject) -> Observation | None:
        if "drafter" not in subject.recipe:
            return None
        return Observation(
            subject.value(name) == trained(subject), subject.value(name), f"{trained(subject)} in recipe.yaml"
        )

    return look


def fc_columns(subject: Subject) -> Observation:
    """Compare the number of layer ids with the columns of fc."""
    columns, hidden = subject.size("feature"), subject.size("hidden") or subject.config.get("hidden_size")
    if columns is None or not hidden:
        return Observation(None, "there is no fc.weight to measure")
    number = len(subject.value("target_layer_ids"))
    return Observation(
        columns == number * hidden, f"{number} layer ids, fc for {columns / hidden:g}", "as many ids as fc has layers"
    )


def mask_token(subject: Subject) -> Observation:
    """Check that the mask token is in the embedding and not in text."""
    check_mask_token(subject.value("mask_token_id"), subject.target)
    return Observation(True, subject.value("mask_token_id"))


def mask_file(subject: Subject) -> Observation:
    """Look for a mask embedding in a file of its own."""
    return none_of([path.name for path in subject.path.glob("mask_embedding.pt")])


def block_size(subject: Subject) -> Observation:
    """Check that a block has a draft slot."""
    found = subject.value("block_size")
    return Observation(type(found) is int and found >= 2, "absent (16)" if found is None else found, "2 or more")


def trained_size(subject: Subject) -> int:
    """Give the block size of the recipe."""
    return subject.recipe["drafter"]["block_size"]


def causality(subject: Subject) -> Observation:
    """Look for a key that makes attention inside a block causal."""
    found = [subject.config.get("is_causal"), subject.nested.get("causal"), subject.nested.get("is_causal")]
    return Observation(not any(found), next((x for x in found if x), "false"), "false")


def layer_types(subject: Subject) -> Observation:
    """Check that every layer has full attention."""
    found = subject.config.get("layer_types", "absent")
    numbers = subject.config.get("num_hidden_layers"), subject.num_layers
    is_right = isinstance(found, list) and set(found) == {"full_attention"} and len(found) in numbers
    return Observation(is_right, found, f"{numbers[0]} full_attention")


def sliding_window(subject: Subject) -> Observation:
    """Look for a sliding window."""
    found = {key: subject.config.get(key) for key in ("use_sliding_window", "sliding_window")}
    return Observation(not any(found.values()), json.dumps(found), "false and null")


def scale(name: str, default: float | None, theirs: Callable[[Target], float | None]) -> Probe:
    """Compare how an embedding or logits are scaled with the target, up to rounding in bf16."""

    def look(subject: Subject) -> Observation:
        found, expected = subject.config.get(name, default), theirs(subject.target)
        is_equal = found == expected or (None not in (found, expected) and abs(found / expected - 1) < 1e-2)
        return Observation(is_equal, "absent" if found is None else found, "absent" if expected is None else expected)

    return look


def engine_reads_scales(subject: Subject) -> Observation | None:
    """Look for keys that vLLM does not read, where vLLM is to serve the drafter."""
    if subject.engine != "vllm":
        return None
    return none_of([key for key in SCALES if key in subject.config])


SHARED = {"embed_tokens.weight": "the embedding", "lm_head.weight": "the LM head"}
MAX_MATRIX_RMS = 1.0
"""Highest root mean square of a matrix's entries; 0.02 when training starts, and little more after a short one."""
MAX_NORM_RMS = 1000.0
"""Highest root mean square of a norm's weights, which start near 1 and may grow much."""


def _shared(subject: Subject) -> dict[str, Tensor]:
    """Give the stored tensors that engines share with the target."""
    return {name: tensor for name, tensor in subject.tensors.items() if name in SHARED}


def _own_embedding(subject: Subject) -> Observation | None:
    embedding = subject.target.model.get_input_embeddings().weight
    tables = {"embed_tokens.weight": embedding, "lm_head.weight": subject.target.head.weight}
    differing = [
        f"{SHARED[name]} differs"
        for name, stored in _shared(subject).items()
        if (table := tables[name]).shape != stored.shape or not torch.allclose(table.to(stored), stored, rtol=1e-2)
    ]
    if not _shared(subject):
        return None
    return Observation(not differing, some(differing) or "equal", "equal to the target's, or not stored")


def _stored_embedding(subject: Subject) -> Observation:
    return none_of([SHARED[name] for name in _shared(subject)])


def _dtype(subject: Subject) -> Observation | None:
    if not subject.config:
        return None
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in subject.tensors.values()})
    written = subject.config.get("dtype", subject.config.get("torch_dtype"))
    observed = f"{' and '.join(stored)}, in the config {written}"
    return Observation(stored == [written], observed, "one dtype, the same in the config")


def _names(subject: Subject) -> Observation:
    return none_of(sorted(name for name in subject.stored if name != published_name(name)))


def _missing(subject: Subject) -> Observation:
    return none_of(sorted(set(subject.axes) - set(subject.tensors)))


def _extra(subject: Subject) -> Observation:
    return none_of(sorted(set(subject.tensors) - set(subject.axes) - set(SHARED)))


def _tensor_shapes(subject: Subject) -> Observation:
    config = subject.config
    head = subject.size("head") or config.get("head_dim", 0)
    by_config = {
        "hidden": subject.target.hidden_size,
        "query": config.get("num_attention_heads", 0) * head,
        "key": config.get("num_key_value_heads", 0) * head,
        "head": head,
        "inner": config.get("intermediate_size", 0),
    }
    kernel, group = (subject.nested.get(key) or 0 for key in ("conv_kernel_size", "conv_group_size"))
    by_config |= {"vocab": len(subject.target.head.weight), "rank": 1, "side": 2, "tap": kernel}
    by_config["kernel"] = 2 * kernel * (by_config["hidden"] // max(1, group))
    by_config["feature"] = len(subject.value("target_layer_ids") or ()) * by_config["hidden"]
    expected = {axis: subject.size(axis) or length for axis, length in by_config.items()}
    wrong = [
        f"{name} {list(subject.tensors[name].shape)}, not {[expected[axis] for axis in axes]}"
        for name, axes in subject.axes.items()
        if name in subject.tensors and list(subject.tensors[name].shape) != [expected[axis] for axis in axes]
    ]
    return none_of(wrong)


def _finite(subject: Subject) -> Observation:
    return none_of([name for name, tensor in subject.tensors.items() if not tensor.isfinite().all()])


def _zero(subject: Subject) -> Observation:
    zero = [name for name, tensor in subject.tensors.items() if not tensor.any()]
    return none_of([name for name in zero if name not in SELECTOR_TENSORS])


def _exploded(subject: Subject) -> Observation:
    limits = {1: MAX_NORM_RMS, 2: MAX_MATRIX_RMS}
    sizes = {name: float(t.float().square().mean().sqrt()) for name, t in subject.tensors.items() if name not in SHARED}
    return none_of([f"{n} {x:.3g}" for n, x in sizes.items() if limits.get(subject.tensors[n].dim(), x) < x < math.inf])


FILE_CHECKS = (
    Check("config readable", "fails", file("config.json", "a JSON object"), FIX_COPY_AGAIN),
    Check("weights readable", "fails", file("model.safetensors", "safetensors"), FIX_COPY_AGAIN),
    Check("recipe readable", "warns", file("recipe.yaml", "YAML, or no file"), "copy it again, or delete it"),
)


CONFIG_CHECKS = (
    Check(
        "architecture",
        "fails",
        architecture,
        "write the expected values; convert other layouts with `dpace import`",
    ),
    Check(
        "hidden_act",
        "fails",
        equals("hidden_act", lambda _: "silu"),
        "write silu, the only one that this layout has",
    ),
    Check("attention_bias", "fails", equals("attention_bias", lambda _: False), "write false: no bias is stored"),
    Check("rms_norm_eps", "warns", written("rms_norm_eps"), "write the value: engines assume 1e-6 without it"),
    Check("rope theta", "fails", rope_theta, "write the target's value in rope_parameters and at the top level"),
    Check("rope scaling", "fails", rope_scaling, "write the target's values in rope_parameters and rope_scaling"),
    Check(
        "rope spellings",
        "warns",
        rope_spellings,
        "write both spellings: an engine that reads only the other one assumes 10000",
    ),
    Check("rope agreement", "fails", rope_agreement, FIX_MAKE_EQUAL),
    Check("rope layout", "fails", rope_layout, "remove these keys: the layout rotates halves of whole heads"),
    Check("head_dim", "fails", head_dim, "write the value: engines assume 128 without it"),
    Check("convolutions", "fails", convolutions, "write the kernel and group size that the tensors have"),
    Check("num_attention_heads", "fails", size("num_attention_heads", "query", "head"), FIX_WRITE_TENSORS),
    Check("num_key_value_heads", "fails", size("num_key_value_heads", "key", "head"), FIX_WRITE_TENSORS),
    Check("intermediate_size", "fails", size("intermediate_size", "inner"), FIX_WRITE_TENSORS),
    Check(
        "num_hidden_layers",
        "fails",
        num_layers,
        "write the number that the tensors have, or copy the weights again",
    ),
    Check("hidden_size", "fails", hidden_size, FIX_USE_TARGETS),
    Check(
        "vocab_size",
        "fails",
        equals("vocab_size", lambda subject: len(subject.target.head.weight)),
        FIX_USE_TARGETS,
    ),
    Check(
        "num_target_layers",
        "fails",
        equals("num_target_layers", lambda subject: subject.target.num_layers),
        FIX_USE_TARGETS,
    ),
    Check(
        "dflash_config",
        "fails",
        nested,
        "write both keys there: vLLM reads no others, and takes other layers without them",
    ),
    Check("layer ids agree", "fails", agreement("target_layer_ids"), FIX_MAKE_EQUAL),
    Check(
        "layer ids order",
        "fails",
        layer_ids("order", "ascending integers, each once"),
        "sort the ids together with the columns of fc: vLLM sorts only the ids",
    ),
    Check(
        "layer ids range",
        "fails",
        layer_ids("range", "in 0 .. {before}"),
        "write ids of layers that the target has, counted from 0",
    ),
    Check(
        "last layer",
        "fails",
        layer_ids("last", "ids without {last}"),
        "train without the last layer: some engines normalize its output, others stop with an error",
    ),
    Check(
        "layer ids offset",
        "warns",
        layer_offset,
        "undo the shift: this layout writes i where speculators and GGUF write i + 1",
    ),
    Check(
        "layer ids as trained",
        "fails",
        as_trained("target_layer_ids", trained_ids),
        "write the ids that the drafter was trained with",
    ),
    Check("fc columns", "fails", fc_columns, "write the layers that the drafter was trained with, in the same order"),
    Check(
        "mask token",
        "fails",
        mask_token,
        "write the token that the drafter was trained with; if it is this one, train again",
    ),
    Check("mask tokens agree", "fails", agreement("mask_token_id"), FIX_MAKE_EQUAL),
    Check(
        "mask_embedding.pt",
        "warns",
        mask_file,
        "remove the file: vLLM, SGLang and llama.cpp read it, others do not",
    ),
    Check(
        "block_size",
        "fails",
        block_size,
        "write the block size of the training: one known token and the draft slots",
    ),
    Check(
        "block_size written",
        "warns",
        written("block_size"),
        "write it at the top level, the only place where SpecForge looks",
    ),
    Check("block sizes agree", "fails", agreement("block_size"), FIX_MAKE_EQUAL),
    Check(
        "block_size as trained",
        "fails",
        as_trained("block_size", trained_size),
        "write the block size of the training: draft tokens + 1",
    ),
    Check("is_causal", "fails", causality, "write false: the slots of a block see each other"),
    Check(
        "is_causal written",
        "warns",
        written("is_causal"),
        "write false: engines assume different values without it",
    ),
    Check("layer_types", "fails", layer_types, "write full_attention for every layer"),
    Check("sliding window", "warns", sliding_window, "write the expected values: full attention has no window"),
    Check(
        "tie_word_embeddings",
        "fails",
        equals("tie_word_embeddings", lambda _: False),
        "write false: the drafter ties no weights",
    ),
    Check(
        "final_logit_softcapping",
        "fails",
        scale("final_logit_softcapping", None, lambda target: target.head.softcap),
        FIX_USE_TARGETS,
    ),
    Check(
        "input_embedding_scale",
        "fails",
        scale("input_embedding_scale", 1.0, lambda target: target.embed_scale),
        FIX_USE_TARGETS,
    ),
    Check(
        "output_multiplier",
        "fails",
        scale("output_multiplier", 1.0, lambda target: target.head.multiplier),
        FIX_USE_TARGETS,
    ),
    Check("engine", "warns", engine_reads_scales, "use another engine: vLLM's V1 runner does not read these keys"),
    Check(
        "target",
        "warns",
        recorded("target"),
        "name the target that the drafter was trained for, in the same variant (base or instruct)",
    ),
    Check("target dtype", "warns", recorded("dtype"), "expect slightly different accepted lengths"),
    Check("tokenizer", "fails", recorded("tokenizer_sha256"), "use the tokenizer that the drafter was trained with"),
    Check(
        "chat template",
        "warns",
        recorded("chat_template_sha256"),
        "use the template of the training, or train on responses with this one",
    ),
    Check(
        "thinking",
        "warns",
        recorded("thinking"),
        "turn thinking on or off as in training (here --thinking), or train on such responses",
    ),
)


WEIGHT_CHECKS = (
    Check("dtype", "warns", _dtype, "write the dtype of the tensors in the config"),
    Check(
        "tensor names",
        "fails",
        _names,
        "rename the tensors with `dpace import`: most engines know only the published names",
    ),
    Check("missing tensors", "fails", _missing, FIX_COPY_AGAIN),
    Check(
        "extra tensors",
        "fails",
        _extra,
        "remove these tensors: dpace and some engines refuse those that they do not know",
    ),
    Check(
        "own embedding",
        "fails",
        _own_embedding,
        "remove this tensor: an engine that reads it drafts with the wrong table",
    ),
    Check("stored embedding", "warns", _stored_embedding, "remove this tensor: engines use the target's"),
    Check(
        "tensor shapes",
        "fails",
        _tensor_shapes,
        "copy or export again: tensors are swapped, transposed or from another drafter",
    ),
    Check("finite", "fails", _finite, "take an earlier checkpoint; train with a lower learning rate"),
    Check("zero tensors", "fails", _zero, FIX_COPY_AGAIN),
    Check("exploded tensors", "warns", _exploded, "take an earlier checkpoint; train with a lower learning rate"),
)
