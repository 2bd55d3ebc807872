"""What the checks of a drafter's config.json look at."""

import json
from collections.abc import Callable
from typing import Any

from dpace.blocks import build_target_layer_ids
from dpace.engines.folder import mapping
from dpace.engines.subject import Observation, Probe, Subject, none_of, some
from dpace.mask_token import check_mask_token
from dpace.probe import rope_of
from dpace.spec import LayerIdFault, find_layer_id_faults
from dpace.target import Target

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
