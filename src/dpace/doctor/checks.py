"""The checks of a drafter's files: what is compared, how bad a difference is, what breaks and what to do.

What comes in is an `ExaminedFolder`; what goes out of each check is an `Observation`. Most keys of the config are
compared with the config that dpace would write (`equal`). Other probes look for what a comparison does not see: two
spellings that differ, layers in a wrong order, a mask token that text contains, weights that are not finite. The page
of checks in the documentation is written from these tables.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from dpace.blocks import build_target_layer_ids
from dpace.doctor.examined import ABSENT, ExaminedFolder, look_up
from dpace.drafter.mask_token import check_mask_token
from dpace.drafter.spec import LayerIdFault, find_layer_id_faults
from dpace.engines.folder import SELECTOR_TENSORS, mapping, published_name

SCALES = ("final_logit_softcapping", "input_embedding_scale", "output_multiplier")
SHARED = {"embed_tokens.weight": "the embedding", "lm_head.weight": "the LM head"}
"""Tensors that engines take from the target."""
MAX_MATRIX_RMS = 1.0
"""Highest root mean square of a matrix's entries; 0.02 when training starts, and little more after a short one."""
MAX_NORM_RMS = 1000.0
"""Highest root mean square of a norm's weights, which start near 1 and may grow much."""


class Observation(NamedTuple):
    """The result of one probe."""

    is_right: bool | None
    """None where it cannot be decided; `found` then says why."""
    found: object
    expected: object = ""


Probe = Callable[[ExaminedFolder], Observation | None]
"""Examines a folder; None where the check does not apply to it, and is not listed."""


class Check(NamedTuple):
    """A named check: what it examines, what to do where that is wrong, and what breaks if nothing is done."""

    name: str
    severity: Literal["fails", "warns"]
    probe: Probe
    fix: str
    breaks: str


def first_names(names: Sequence[str]) -> str:
    """Name the first three, and count the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def expect_none(names: Sequence[str]) -> Observation:
    """Expect an empty list of names."""
    return Observation(not names, first_names(names) or "none", "none")


def readable(name: str, expected: str) -> Probe:
    """Expect that a file could be read."""
    return lambda folder: Observation(name not in folder.problems, folder.problems.get(name, name), expected)


def equal(*paths: str) -> Probe:
    """Compare keys with those of the config that dpace would write."""

    def probe(folder: ExaminedFolder) -> Observation:
        found = [look_up(folder.config, path) for path in paths]
        expected = [look_up(folder.expected_config, path) for path in paths]
        if None in expected:
            return Observation(None, "the tensors have different lengths")
        return Observation(found == expected, ", ".join(map(str, found)), ", ".join(map(str, expected)))

    return probe


def off(*paths: str) -> Probe:
    """Expect that keys are false, null or absent."""

    def probe(folder: ExaminedFolder) -> Observation:
        found = {path: look_up(folder.config, path) for path in paths}
        set_ones = {path: value for path, value in found.items() if value and value != ABSENT}
        return Observation(not set_ones, set_ones or "false", "false or null")

    return probe


def written(*paths: str) -> Probe:
    """Expect keys, whatever their values."""

    def probe(folder: ExaminedFolder) -> Observation:
        missing = [path for path in paths if look_up(folder.config, path) == ABSENT]
        return Observation(not missing, f"without {first_names(missing)}" if missing else "complete", ", ".join(paths))

    return probe


def agreement(name: str) -> Probe:
    """Compare a key at the top level with the same key in `dflash_config`."""

    def probe(folder: ExaminedFolder) -> Observation | None:
        if name not in folder.config or name not in folder.nested:
            return None
        top, nested = folder.config[name], folder.nested[name]
        return Observation(top == nested, f"top level {top}, in dflash_config {nested}", "equal")

    return probe


def recorded(name: str) -> Probe:
    """Compare a fact that training recorded with the same fact today."""

    def probe(folder: ExaminedFolder) -> Observation:
        before, now = folder.record.get(name, ""), folder.facts.get(name, "")
        if "" in (before, now):
            return Observation(None, "training did not record it" if before == "" else "the target does not say")
        return Observation(before == now, str(now)[:24], f"{str(before)[:24]} as in training")

    return probe


def scale(name: str, neutral: float) -> Probe:
    """Compare a scale or cap with the target's, up to rounding in bf16; without the key it is `neutral`."""

    def probe(folder: ExaminedFolder) -> Observation:
        found, expected = (config.get(name) or neutral for config in (folder.config, folder.expected_config))
        is_equal = found == expected or abs(found / expected - 1) < 1e-2
        return Observation(is_equal, *(ABSENT if value == neutral else value for value in (found, expected)))

    return probe


def layer_ids(fault: LayerIdFault, expected: str) -> Probe:
    """Look for one fault that `find_layer_id_faults` knows.

    `{last}` in `expected` stands for the target's last layer, `{before}` for the layer before it.
    """

    def probe(folder: ExaminedFolder) -> Observation:
        ids, number = folder.value("target_layer_ids"), folder.target.num_layers
        faults = find_layer_id_faults(ids, number)
        return Observation(fault not in faults, ids, expected.format(last=number - 1, before=number - 2))

    return probe


def trained_ids(folder: ExaminedFolder) -> list[int]:
    """Return the layer ids that the recipe stands for."""
    options = folder.recipe["drafter"]
    number = options["num_features"] or options["num_layers"]
    return list(options["target_layer_ids"] or build_target_layer_ids(folder.target.num_layers, number))


def as_trained(name: str, trained: Callable[[ExaminedFolder], object]) -> Probe:
    """Compare a key of DFlash with the recipe beside the drafter."""

    def probe(folder: ExaminedFolder) -> Observation | None:
        if "drafter" not in folder.recipe:
            return None
        found, expected = folder.value(name), trained(folder)
        return Observation(found == expected, found, f"{expected} in recipe.yaml")

    return probe


def layer_offset(folder: ExaminedFolder) -> Observation | None:
    """Look for ids that are the published rule's, shifted by one."""
    ids = folder.value("target_layer_ids")
    if "drafter" in folder.recipe and ids == trained_ids(folder):
        return None
    rule = build_target_layer_ids(folder.target.num_layers, len(ids))
    is_shifted = any(ids == [i + step for i in rule] for step in (-1, 1))
    return Observation(not is_shifted, ids, f"{rule} (the published rule), or ids that are not these shifted by one")


def fc_columns(folder: ExaminedFolder) -> Observation:
    """Compare the number of layer ids with the columns of fc."""
    columns, hidden = folder.size("feature"), folder.size("hidden") or folder.config.get("hidden_size")
    if columns is None or not hidden:
        return Observation(None, "there is no fc.weight to measure")
    number = len(folder.value("target_layer_ids"))
    found = f"{number} layer ids, fc for {columns / hidden:g}"
    return Observation(columns == number * hidden, found, "as many ids as fc has layers")


def scaling_of(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling of a rotary embedding under the names of `rope_parameters`."""
    others = {k: v for k, v in rope.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    return {"rope_type": rope.get("type", "default"), **others}


def rope_theta(folder: ExaminedFolder) -> Observation:
    """Compare the base of the rotary embedding with the target's."""
    found, expected = folder.rope.get("rope_theta"), folder.expected_spec.rope["rope_theta"]
    return Observation(found == expected, "absent (10000)" if found is None else found, expected)


def rope_scaling(folder: ExaminedFolder) -> Observation:
    """Compare the scaling of the rotary embedding with the target's."""
    found, expected = scaling_of(folder.rope), scaling_of(folder.expected_spec.rope)
    return Observation(found == expected, found, expected)


def rope_spellings(folder: ExaminedFolder) -> Observation:
    """Look for both spellings of the rotary embedding, since some engines read only one."""
    is_scaled = scaling_of(folder.rope) != {"rope_type": "default"}
    needed = ["rope_parameters", "rope_theta", *(["rope_scaling"] if is_scaled else [])]
    missing = [key for key in needed if not folder.config.get(key)]
    return Observation(not missing, f"without {first_names(missing)}" if missing else "both", ", ".join(needed))


def rope_agreement(folder: ExaminedFolder) -> Observation | None:
    """Compare both spellings of the rotary embedding."""
    old, new = folder.config.get("rope_theta"), mapping(folder.config.get("rope_parameters")).get("rope_theta")
    if None in (old, new):
        return None
    scaling = scaling_of(mapping(folder.config.get("rope_scaling")) or folder.rope)
    is_equal = old == new and scaling == scaling_of(folder.rope)
    return Observation(is_equal, f"old theta {old:g}, {scaling}; new {new:g}, {scaling_of(folder.rope)}", "equal")


def rope_layout(folder: ExaminedFolder) -> Observation:
    """Look for keys that rotate anything but halves of whole heads."""
    odd = {key: folder.config.get(key, folder.rope.get(key)) for key in ("rope_interleaved", "partial_rotary_factor")}
    odd = {key: value for key, value in odd.items() if value is True or value not in (None, False, 1.0)}
    return Observation(not odd, odd or "halves of whole heads", "halves of whole heads")


def mask_token(folder: ExaminedFolder) -> Observation:
    """Check that the mask token is in the embedding and not in text."""
    check_mask_token(folder.value("mask_token_id"), folder.target)
    return Observation(True, folder.value("mask_token_id"))


def block_size(folder: ExaminedFolder) -> Observation:
    """Check that a block has a draft slot."""
    found = folder.value("block_size")
    return Observation(type(found) is int and found >= 2, "absent (16)" if found is None else found, "2 or more")


def engine_reads_scales(folder: ExaminedFolder) -> Observation | None:
    """Look for keys that vLLM does not read, where vLLM is to serve the drafter."""
    return expect_none([key for key in SCALES if key in folder.config]) if folder.engine == "vllm" else None


def dtype(folder: ExaminedFolder) -> Observation | None:
    """Compare the dtype of the config with that of the tensors."""
    if not folder.config:
        return None
    named = folder.config.get("dtype", folder.config.get("torch_dtype"))
    found = f"{' and '.join(folder.stored_dtypes)}, in the config {named}"
    return Observation(folder.stored_dtypes == [named], found, "one dtype, the same in the config")


def own_embedding(folder: ExaminedFolder) -> Observation | None:
    """Compare stored tables with the target's, where there are any."""
    embedding = folder.target.model.get_input_embeddings().weight
    tables = {"embed_tokens.weight": embedding, "lm_head.weight": folder.target.head.weight}
    pairs = {name: (table, folder.tensors[name]) for name, table in tables.items() if name in folder.tensors}
    differing = [
        f"{SHARED[name]} differs"
        for name, (table, stored) in pairs.items()
        if table.shape != stored.shape or not torch.allclose(table.to(stored), stored, rtol=1e-2)
    ]
    found = first_names(differing) or "equal"
    return Observation(not differing, found, "equal to the target's, or not stored") if pairs else None


def tensor_shapes(folder: ExaminedFolder) -> Observation:
    """Compare the shape of each tensor with what the others, the target and the config say."""
    shapes = {
        name: (list(folder.tensors[name].shape), [folder.expected_axes[axis] for axis in axes])
        for name, axes in folder.axes.items()
        if name in folder.tensors
    }
    return expect_none([f"{n} {found}, not {expected}" for n, (found, expected) in shapes.items() if found != expected])


def exploded(folder: ExaminedFolder) -> Observation:
    """Look for tensors whose entries are too large to have been trained."""
    limits = {1: MAX_NORM_RMS, 2: MAX_MATRIX_RMS}
    sizes = {name: float(t.float().square().mean().sqrt()) for name, t in folder.tensors.items() if name not in SHARED}
    wrong = {
        name: size for name, size in sizes.items() if limits.get(folder.tensors[name].dim(), size) < size < math.inf
    }
    return expect_none([f"{name} {size:.3g}" for name, size in wrong.items()])


COPY_AGAIN = "copy or export the drafter again"
MAKE_EQUAL = "make both equal: some engines read one, some the other"
WRITE_TENSORS = "write the number that the tensors have"
USE_TARGETS = "write the target's value, or take a drafter that was trained for this target"
EARLIER = "take an earlier checkpoint; train with a lower learning rate"

FILE_CHECKS = (
    Check("config readable", "fails", readable("config.json", "a JSON object"), COPY_AGAIN, "nothing loads"),
    Check(
        "weights readable",
        "fails",
        readable("model.safetensors", "safetensors"),
        COPY_AGAIN,
        "nothing loads; a truncated copy is the usual cause",
    ),
    Check(
        "recipe readable",
        "warns",
        readable("recipe.yaml", "YAML, or no file"),
        "copy it again, or delete it",
        "the checks against the training are lost",
    ),
)
CONFIG_CHECKS = (
    Check(
        "architecture",
        "fails",
        equal("architectures", "model_type", "speculators_model_type"),
        "write the expected values; convert other layouts with `dpace import`",
        "vLLM, SGLang and llama.cpp choose the class by it; `model_type` is `qwen3` for every target family",
    ),
    Check(
        "hidden_act",
        "fails",
        equal("hidden_act"),
        "write silu, the only one that this layout has",
        "the feed-forward network computes something else",
    ),
    Check(
        "attention_bias",
        "fails",
        equal("attention_bias"),
        "write false: no bias is stored",
        "engines look for biases that are not there",
    ),
    Check(
        "rms_norm_eps",
        "warns",
        written("rms_norm_eps"),
        "write the value: engines assume 1e-6 without it",
        "engines assume 1e-6",
    ),
    Check(
        "rope theta",
        "fails",
        rope_theta,
        "write the target's value in rope_parameters and at the top level",
        "positions are read wrongly: acceptance falls with the length of the text",
    ),
    Check(
        "rope scaling",
        "fails",
        rope_scaling,
        "write the target's values in rope_parameters and rope_scaling",
        "the same, where the target scales its rotary embedding (Llama 3.1, YaRN)",
    ),
    Check(
        "rope spellings",
        "warns",
        rope_spellings,
        "write both spellings: an engine that reads only the other one assumes 10000",
        "engines that read the other of `rope_parameters` (new) and `rope_theta` (old) assume 10000",
    ),
    Check("rope agreement", "fails", rope_agreement, MAKE_EQUAL, "acceptance depends on the engine"),
    Check(
        "rope layout",
        "fails",
        rope_layout,
        "remove these keys: the layout rotates halves of whole heads",
        "the layout rotates the halves of whole heads; this target rotates pairs or a part",
    ),
    Check(
        "head_dim",
        "fails",
        equal("head_dim"),
        "write the value: engines assume 128 without it",
        "absent it is 128, in transformers and in llama.cpp's converter",
    ),
    Check(
        "convolutions",
        "fails",
        equal("dflash_config.conv_kernel_size", "dflash_config.conv_group_size"),
        "write the kernel and group size that the tensors have",
        "engines read other taps and groups than the tensors have",
    ),
    Check(
        "num_attention_heads",
        "fails",
        equal("num_attention_heads"),
        WRITE_TENSORS,
        "the projections are cut into other heads",
    ),
    Check("num_key_value_heads", "fails", equal("num_key_value_heads"), WRITE_TENSORS, "the same for keys and values"),
    Check("intermediate_size", "fails", equal("intermediate_size"), WRITE_TENSORS, "the weights do not fit"),
    Check(
        "num_hidden_layers",
        "fails",
        equal("num_hidden_layers"),
        "write the number that the tensors have, or copy the weights again",
        "layers are left out, or random ones added",
    ),
    Check(
        "hidden_size",
        "fails",
        equal("hidden_size"),
        USE_TARGETS,
        "the target's hidden states, embedding and head do not fit",
    ),
    Check("vocab_size", "fails", equal("vocab_size"), USE_TARGETS, "engines size the draft's logits by it"),
    Check(
        "num_target_layers",
        "fails",
        equal("num_target_layers"),
        USE_TARGETS,
        "z-lab's code reads it even where ids are given; ollama compares it",
    ),
    Check(
        "dflash_config",
        "fails",
        written("dflash_config.target_layer_ids", "dflash_config.mask_token_id"),
        "write both keys there: vLLM reads no others, and takes other layers without them",
        "vLLM reads ids and mask token here only, and silently takes other layers",
    ),
    Check("layer ids agree", "fails", agreement("target_layer_ids"), MAKE_EQUAL, "engines differ in which they read"),
    Check(
        "layer ids order",
        "fails",
        layer_ids("order", "ascending integers, each once"),
        "sort the ids together with the columns of fc: vLLM sorts only the ids",
        "vLLM sorts the ids but not the columns of `fc`: nearly nothing is accepted",
    ),
    Check(
        "layer ids range",
        "fails",
        layer_ids("range", "in 0 .. {before}"),
        "write ids of layers that the target has, counted from 0",
        "no such layer",
    ),
    Check(
        "last layer",
        "fails",
        layer_ids("last", "ids without {last}"),
        "train without the last layer: some engines normalize its output, others stop with an error",
        "its output is normalized in transformers, not in vLLM; SGLang never captures it, llama.cpp aborts",
    ),
    Check(
        "layer ids offset",
        "warns",
        layer_offset,
        "undo the shift: this layout writes i where speculators and GGUF write i + 1",
        "hidden states of a neighbor layer: layer `i` is `i` here and `i + 1` in speculators and GGUF",
    ),
    Check(
        "layer ids as trained",
        "fails",
        as_trained("target_layer_ids", trained_ids),
        "write the ids that the drafter was trained with",
        "hidden states come from layers that the drafter has never seen",
    ),
    Check(
        "fc columns",
        "fails",
        fc_columns,
        "write the layers that the drafter was trained with, in the same order",
        "the hidden states do not fit",
    ),
    Check(
        "mask token",
        "fails",
        mask_token,
        "write the token that the drafter was trained with; if it is this one, train again",
        "outside the embedding; or a token that text contains, which some engines strip or stop at",
    ),
    Check("mask tokens agree", "fails", agreement("mask_token_id"), MAKE_EQUAL, "engines differ in which they read"),
    Check(
        "mask_embedding.pt",
        "warns",
        lambda folder: expect_none([path.name for path in folder.path.glob("mask_embedding.pt")]),
        "remove the file: vLLM, SGLang and llama.cpp read it, others do not",
        "vLLM, SGLang and llama.cpp use it instead of the embedding's row, others do not",
    ),
    Check(
        "block_size",
        "fails",
        block_size,
        "write the block size of the training: one known token and the draft slots",
        "absent it is 16; a block needs a draft slot",
    ),
    Check(
        "block_size written",
        "warns",
        written("block_size"),
        "write it at the top level, the only place where SpecForge looks",
        "SpecForge and dflash-mlx read it at the top level only",
    ),
    Check("block sizes agree", "fails", agreement("block_size"), MAKE_EQUAL, "engines differ in which they read"),
    Check(
        "block_size as trained",
        "fails",
        as_trained("block_size", lambda folder: folder.recipe["drafter"]["block_size"]),
        "write the block size of the training: draft tokens + 1",
        "the number of drafts was written instead, or the block is longer than in training",
    ),
    Check(
        "is_causal",
        "fails",
        off("is_causal", "dflash_config.causal", "dflash_config.is_causal"),
        "write false: the slots of a block see each other",
        "slots no longer see each other",
    ),
    Check(
        "is_causal written",
        "warns",
        written("is_causal"),
        "write false: engines assume different values without it",
        "engines assume different things where it is absent",
    ),
    Check(
        "layer_types",
        "fails",
        equal("layer_types"),
        "write full_attention for every layer",
        "SpecForge needs it; sliding layers lose the text before the window; vLLM refuses a mixture",
    ),
    Check(
        "sliding window",
        "warns",
        off("use_sliding_window", "sliding_window"),
        "write false and null: full attention has no window",
        "engines may cut the context at it",
    ),
    Check(
        "tie_word_embeddings",
        "fails",
        equal("tie_word_embeddings"),
        "write false: the drafter ties no weights",
        "a random head is tied to an embedding that is not there",
    ),
    Check(
        "final_logit_softcapping",
        "fails",
        scale("final_logit_softcapping", math.inf),
        USE_TARGETS,
        "sampled drafts and confidences are wrong: the target caps its logits, or does not",
    ),
    Check(
        "input_embedding_scale",
        "fails",
        scale("input_embedding_scale", 1.0),
        USE_TARGETS,
        "the drafter reads other embeddings than in training (Gemma scales them)",
    ),
    Check("output_multiplier", "fails", scale("output_multiplier", 1.0), USE_TARGETS, "the same for logits"),
    Check(
        "engine",
        "warns",
        engine_reads_scales,
        "use another engine: vLLM's V1 runner does not read these keys",
        "vLLM's V1 runner ignores the three keys before",
    ),
    Check(
        "target",
        "warns",
        recorded("target"),
        "name the target that the drafter was trained for, in the same variant (base or instruct)",
        "base and instruct models, or two sizes, are confused",
    ),
    Check(
        "target dtype",
        "warns",
        recorded("dtype"),
        "expect slightly different accepted lengths",
        "hidden states are rounded differently",
    ),
    Check(
        "tokenizer",
        "fails",
        recorded("tokenizer_sha256"),
        "use the tokenizer that the drafter was trained with",
        "ids mean other tokens",
    ),
    Check(
        "chat template",
        "warns",
        recorded("chat_template_sha256"),
        "use the template of the training, or train on responses with this one",
        "the drafter has not seen such text",
    ),
    Check(
        "thinking",
        "warns",
        recorded("thinking"),
        "turn thinking on or off as in training (here --thinking), or train on such responses",
        "a drafter trained without thinking accepts less than half with it",
    ),
)
WEIGHT_CHECKS = (
    Check(
        "dtype",
        "warns",
        dtype,
        "write the dtype of the tensors in the config",
        "engines convert, and some refuse a mixture",
    ),
    Check(
        "tensor names",
        "fails",
        lambda folder: expect_none(sorted(name for name in folder.stored if name != published_name(name))),
        "rename the tensors with `dpace import`: most engines know only the published names",
        "most engines know the published names only",
    ),
    Check(
        "missing tensors",
        "fails",
        lambda folder: expect_none(sorted(set(folder.axes) - set(folder.tensors))),
        COPY_AGAIN,
        "random weights, or a refusal",
    ),
    Check(
        "extra tensors",
        "fails",
        lambda folder: expect_none(sorted(set(folder.tensors) - set(folder.axes) - set(SHARED))),
        "remove these tensors: dpace and some engines refuse those that they do not know",
        "dpace does not load the folder; vLLM refuses some, such as `mask_hidden`",
    ),
    Check(
        "own embedding",
        "fails",
        own_embedding,
        "remove this tensor: an engine that reads it drafts with the wrong table",
        "an engine that reads it drafts with another table than the target's",
    ),
    Check(
        "stored embedding",
        "warns",
        lambda folder: expect_none([SHARED[name] for name in folder.tensors if name in SHARED]),
        "remove this tensor: engines use the target's",
        "a larger file",
    ),
    Check(
        "tensor shapes",
        "fails",
        tensor_shapes,
        "copy or export again: tensors are swapped, transposed or from another drafter",
        "nothing loads, or swapped tensors do",
    ),
    Check(
        "finite",
        "fails",
        lambda folder: expect_none([n for n, tensor in folder.tensors.items() if not tensor.isfinite().all()]),
        EARLIER,
        "no draft is ever accepted",
    ),
    Check(
        "zero tensors",
        "fails",
        lambda folder: expect_none([n for n, t in folder.tensors.items() if n not in SELECTOR_TENSORS and not t.any()]),
        COPY_AGAIN,
        "a layer does nothing",
    ),
    Check("exploded tensors", "warns", exploded, EARLIER, "drafts are near random; overflow in half precision"),
)
