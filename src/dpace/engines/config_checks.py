"""Checks of a drafter's config.json against the published layout and its target."""

import json
from collections.abc import Callable
from typing import Any

from dpace.blocks import build_target_layer_ids
from dpace.drafter import check_mask_token, rope_of
from dpace.engines.folder import mapping
from dpace.engines.subject import Check, Observation, Probe, Subject, none_of, some
from dpace.spec import LayerIdFault, find_layer_id_faults
from dpace.target import Target

SCALES = ("final_logit_softcapping", "input_embedding_scale", "output_multiplier")


def _key(name: str, expected: Callable[[Subject], object]) -> Probe:
    """A key at the top level with a known value."""
    return lambda subject: Observation(
        subject.config.get(name) == expected(subject), subject.config.get(name, "absent"), expected(subject)
    )


def _written(name: str) -> Probe:
    """A key at the top level, whatever its value."""
    return lambda subject: Observation(name in subject.config, subject.config.get(name, "absent"), "written")


def _size(name: str, axis: str, factor: str | None = None) -> Probe:
    """A key that gives the length of an axis of the tensors, times head_dim where `factor` says so."""

    def look(subject: Subject) -> Observation:
        measured, unit = subject.size(axis), subject.size(factor) if factor else 1
        if measured is None or unit is None:
            return Observation(None, "the tensors do not agree on it")
        return Observation(
            subject.config.get(name) == measured / unit, subject.config.get(name, "absent"), measured // unit
        )

    return look


def _file(name: str, expected: str) -> Probe:
    return lambda subject: Observation(name not in subject.problems, subject.problems.get(name, name), expected)


def _agree(name: str) -> Probe:
    """A key that stands at the top level and nested."""

    def look(subject: Subject) -> Observation | None:
        if name not in subject.config or name not in subject.nested:
            return None
        top, nested = subject.config[name], subject.nested[name]
        return Observation(top == nested, f"top level {top}, in dflash_config {nested}", "equal")

    return look


def _recorded(name: str) -> Probe:
    """A fact that training recorded against the same fact today."""

    def look(subject: Subject) -> Observation:
        before, now = subject.record.get(name, ""), subject.facts.get(name, "")
        if "" in (before, now):
            return Observation(None, "not recorded by the training" if before == "" else "the target does not say")
        return Observation(before == now, str(now)[:24], f"{str(before)[:24]}, as in training")

    return look


def _head_dim(subject: Subject) -> Observation:
    theirs = subject.target.config
    expected = subject.size("head") or getattr(theirs, "head_dim", None)
    expected = expected or theirs.hidden_size // theirs.num_attention_heads
    return Observation(
        subject.config.get("head_dim") == expected, subject.config.get("head_dim", "absent (128)"), expected
    )


def _hidden_size(subject: Subject) -> Observation:
    found, expected = subject.config.get("hidden_size", "absent"), subject.target.hidden_size
    measured = subject.size("hidden") or expected
    return Observation(
        found == measured == expected, f"{found}, in the tensors {measured}", f"{expected}, the target's"
    )


def _architecture(subject: Subject) -> Observation:
    found = [subject.config.get("architectures"), subject.config.get("model_type")]
    if "speculators_model_type" in subject.config:
        return Observation(False, "the layout of speculators", "the published layout")
    expected = [["DFlashDraftModel"], "qwen3"]
    return Observation(found == expected, f"{found[0]}, {found[1]}", f"{expected[0]}, {expected[1]}")


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """How a rotary embedding is stretched, in today's words."""
    others = {k: v for k, v in rope.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    return {"rope_type": rope.get("type", "default"), **others}


def _rope_theta(subject: Subject) -> Observation:
    found, expected = subject.rope.get("rope_theta"), rope_of(subject.target.config)["rope_theta"]
    return Observation(found == expected, "absent (10000)" if found is None else found, expected)


def _rope_scaling(subject: Subject) -> Observation:
    found, expected = _scaling(subject.rope), _scaling(rope_of(subject.target.config))
    return Observation(found == expected, found, expected)


def _rope_spellings(subject: Subject) -> Observation:
    missing = [key for key in ("rope_parameters", "rope_theta") if subject.config.get(key) is None]
    if _scaling(subject.rope) != {"rope_type": "default"} and not subject.config.get("rope_scaling"):
        missing.append("rope_scaling")
    return Observation(not missing, f"without {some(missing)}" if missing else "both", "rope_parameters and rope_theta")


def _rope_agreement(subject: Subject) -> Observation | None:
    old, new = subject.config.get("rope_theta"), mapping(subject.config.get("rope_parameters")).get("rope_theta")
    if None in (old, new):
        return None
    scaling = _scaling(mapping(subject.config.get("rope_scaling")) or subject.rope)
    is_equal = old == new and scaling == _scaling(subject.rope)
    return Observation(is_equal, f"old theta {old:g}, {scaling}; new {new:g}, {_scaling(subject.rope)}", "equal")


def _rope_layout(subject: Subject) -> Observation:
    odd = {key: subject.config.get(key, subject.rope.get(key)) for key in ("rope_interleaved", "partial_rotary_factor")}
    odd = {key: value for key, value in odd.items() if value is True or value not in (None, False, 1.0)}
    return Observation(not odd, odd or "halves of whole heads", "halves of whole heads")


def _nested(subject: Subject) -> Observation:
    missing = [key for key in ("target_layer_ids", "mask_token_id") if key not in subject.nested]
    return Observation(
        not missing, f"without {some(missing)}" if missing else "complete", "target_layer_ids, mask_token_id"
    )


def _num_layers(subject: Subject) -> Observation | None:
    found = subject.config.get("num_hidden_layers", "absent")
    return Observation(found == subject.num_layers, found, subject.num_layers) if subject.tensors else None


def _layer_ids(fault: LayerIdFault, expected: str) -> Probe:
    """One of the rules of `find_layer_id_faults`; `{last}` in `expected` is the target's last layer."""

    def probe(subject: Subject) -> Observation:
        ids, number = subject.value("target_layer_ids"), subject.target.num_layers
        faults = find_layer_id_faults(ids, number)
        return Observation(fault not in faults, ids, expected.format(last=number - 1, before=number - 2))

    return probe


def _trained_ids(subject: Subject) -> list[int]:
    options = subject.recipe["drafter"]
    number = options["num_features"] or options["num_layers"]
    return list(options["target_layer_ids"] or build_target_layer_ids(subject.target.num_layers, number))


def _layer_offset(subject: Subject) -> Observation | None:
    ids = subject.value("target_layer_ids")
    if "drafter" in subject.recipe and ids == _trained_ids(subject):
        return None
    rule = build_target_layer_ids(subject.target.num_layers, len(ids))
    is_shifted = any(ids == [i + step for i in rule] for step in (-1, 1))
    return Observation(not is_shifted, ids, f"{rule} by the published rule, or ids that are not those shifted by one")


def _as_trained(name: str, trained: Callable[[Subject], object]) -> Probe:
    """A key of DFlash against the recipe beside the drafter."""

    def look(subject: Subject) -> Observation | None:
        if "drafter" not in subject.recipe:
            return None
        return Observation(
            subject.value(name) == trained(subject), subject.value(name), f"{trained(subject)} in recipe.yaml"
        )

    return look


def _fc_columns(subject: Subject) -> Observation:
    columns, hidden = subject.size("feature"), subject.size("hidden") or subject.config.get("hidden_size")
    if columns is None or not hidden:
        return Observation(None, "no fc.weight to measure")
    number = len(subject.value("target_layer_ids"))
    return Observation(
        columns == number * hidden, f"{number} layer ids, fc for {columns / hidden:g}", "as many as fc takes"
    )


def _mask_token(subject: Subject) -> Observation:
    check_mask_token(subject.value("mask_token_id"), subject.target)
    return Observation(True, subject.value("mask_token_id"))


def _mask_file(subject: Subject) -> Observation:
    return none_of([path.name for path in subject.path.glob("mask_embedding.pt")])


def _block_size(subject: Subject) -> Observation:
    found = subject.value("block_size")
    return Observation(type(found) is int and found >= 2, "absent (16)" if found is None else found, "2 or more")


def _trained_size(subject: Subject) -> int:
    return subject.recipe["drafter"]["block_size"]


def _is_causal(subject: Subject) -> Observation:
    found = [subject.config.get("is_causal"), subject.nested.get("causal"), subject.nested.get("is_causal")]
    return Observation(not any(found), next((x for x in found if x), "false"), "false")


def _layer_types(subject: Subject) -> Observation:
    found, numbers = (
        subject.config.get("layer_types", "absent"),
        (subject.config.get("num_hidden_layers"), subject.num_layers),
    )
    is_right = isinstance(found, list) and set(found) == {"full_attention"} and len(found) in numbers
    return Observation(is_right, found, f"{numbers[0]} full_attention")


def _sliding_window(subject: Subject) -> Observation:
    found = {key: subject.config.get(key) for key in ("use_sliding_window", "sliding_window")}
    return Observation(not any(found.values()), json.dumps(found), "false and null")


def _scale(name: str, default: float | None, theirs: Callable[[Target], float | None]) -> Probe:
    """A key of how embedding and logits are scaled, against what the target does; rounding in bf16 is allowed for."""

    def look(subject: Subject) -> Observation:
        found, expected = subject.config.get(name, default), theirs(subject.target)
        is_equal = found == expected or (None not in (found, expected) and abs(found / expected - 1) < 1e-2)
        return Observation(is_equal, "absent" if found is None else found, "absent" if expected is None else expected)

    return look


def _engine(subject: Subject) -> Observation | None:
    if subject.engine != "vllm":
        return None
    return none_of([key for key in SCALES if key in subject.config])


FIX_COPY_AGAIN = "copy or export the drafter again"
FIX_MAKE_EQUAL = "make both equal: engines differ in which they read"
FIX_WRITE_TENSORS = "write what the tensors have"
FIX_USE_TARGETS = "write the target's, or take the drafter of this target"
FILE_CHECKS = (
    Check("config readable", "fails", _file("config.json", "a JSON object"), FIX_COPY_AGAIN),
    Check("weights readable", "fails", _file("model.safetensors", "safetensors"), FIX_COPY_AGAIN),
    Check("recipe readable", "warns", _file("recipe.yaml", "YAML, or no file"), "copy it again, or delete it"),
)


CONFIG_CHECKS = (
    Check("architecture", "fails", _architecture, "write those; other layouts go through `dpace import`"),
    Check("hidden_act", "fails", _key("hidden_act", lambda _: "silu"), "write silu, the layout's only one"),
    Check("attention_bias", "fails", _key("attention_bias", lambda _: False), "write false: no bias is stored"),
    Check("rms_norm_eps", "warns", _written("rms_norm_eps"), "write it: the default of engines is 1e-6"),
    Check("rope theta", "fails", _rope_theta, "write the target's in rope_parameters and at the top level"),
    Check("rope scaling", "fails", _rope_scaling, "write the target's in rope_parameters and rope_scaling"),
    Check("rope spellings", "warns", _rope_spellings, "write all: some engines read one and assume 10000 without it"),
    Check("rope agreement", "fails", _rope_agreement, FIX_MAKE_EQUAL),
    Check("rope layout", "fails", _rope_layout, "remove these keys: the layout rotates halves of whole heads"),
    Check("head_dim", "fails", _head_dim, "write it: engines assume 128 without it"),
    Check("num_attention_heads", "fails", _size("num_attention_heads", "query", "head"), FIX_WRITE_TENSORS),
    Check("num_key_value_heads", "fails", _size("num_key_value_heads", "key", "head"), FIX_WRITE_TENSORS),
    Check("intermediate_size", "fails", _size("intermediate_size", "inner"), FIX_WRITE_TENSORS),
    Check("num_hidden_layers", "fails", _num_layers, "write what the tensors have, or copy the weights again"),
    Check("hidden_size", "fails", _hidden_size, FIX_USE_TARGETS),
    Check("vocab_size", "fails", _key("vocab_size", lambda subject: len(subject.target.head.weight)), FIX_USE_TARGETS),
    Check(
        "num_target_layers",
        "fails",
        _key("num_target_layers", lambda subject: subject.target.num_layers),
        FIX_USE_TARGETS,
    ),
    Check("dflash_config", "fails", _nested, "write them there: vLLM reads nothing else and takes other layers"),
    Check("layer ids agree", "fails", _agree("target_layer_ids"), FIX_MAKE_EQUAL),
    Check(
        "layer ids order",
        "fails",
        _layer_ids("order", "ascending whole numbers, each once"),
        "sort them with the columns of fc: vLLM sorts the ids alone",
    ),
    Check(
        "layer ids range", "fails", _layer_ids("range", "in 0 .. {before}"), "name layers of the target, counted from 0"
    ),
    Check(
        "last layer",
        "fails",
        _layer_ids("last", "without {last}"),
        "train without it: some engines normalize its output, others abort",
    ),
    Check(
        "layer ids offset", "warns", _layer_offset, "undo the shift: speculators and GGUF write i + 1, this layout i"
    ),
    Check("layer ids as trained", "fails", _as_trained("target_layer_ids", _trained_ids), "write the training's"),
    Check("fc columns", "fails", _fc_columns, "name the layers of the training, in its order"),
    Check("mask token", "fails", _mask_token, "write the training's; if it is this one, train again"),
    Check("mask tokens agree", "fails", _agree("mask_token_id"), FIX_MAKE_EQUAL),
    Check("mask_embedding.pt", "warns", _mask_file, "remove it: vLLM, SGLang and llama.cpp read it, others do not"),
    Check("block_size", "fails", _block_size, "write the training's: the anchor and the draft slots"),
    Check("block_size written", "warns", _written("block_size"), "write it at the top level: SpecForge reads no other"),
    Check("block sizes agree", "fails", _agree("block_size"), FIX_MAKE_EQUAL),
    Check(
        "block_size as trained", "fails", _as_trained("block_size", _trained_size), "write the training's: drafts + 1"
    ),
    Check("is_causal", "fails", _is_causal, "write false: the slots of a block see each other"),
    Check("is_causal written", "warns", _written("is_causal"), "write false: engines differ in what they assume"),
    Check("layer_types", "fails", _layer_types, "write full_attention for every layer"),
    Check("sliding window", "warns", _sliding_window, "write these: full attention has no window"),
    Check("tie_word_embeddings", "fails", _key("tie_word_embeddings", lambda _: False), "write false: nothing is tied"),
    Check(SCALES[0], "fails", _scale(SCALES[0], None, lambda target: target.head.softcap), FIX_USE_TARGETS),
    Check(SCALES[1], "fails", _scale(SCALES[1], 1.0, lambda target: target.embed_scale), FIX_USE_TARGETS),
    Check(SCALES[2], "fails", _scale(SCALES[2], 1.0, lambda target: target.head.multiplier), FIX_USE_TARGETS),
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
