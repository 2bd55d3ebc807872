"""The checks of a drafter's files: what is examined, how bad a fault is, what to do, and what breaks.

What comes in is an `ExaminedFolder`; what goes out of each check is an `Observation`. Most keys of the config are
compared with the config that dpace would write (`equal`). Other probes look for what a comparison does not see: two
spellings that differ, layers in a wrong order, a mask token that text contains, weights that are not finite. The page
of checks in the documentation is written from these tables.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from dpace.blocks import build_target_layer_ids
from dpace.doctor.examined import ABSENT, ExaminedFolder, look_up
from dpace.drafter import lilicorr
from dpace.drafter.dflash import SELECTOR_TENSORS, TABLES
from dpace.drafter.drafter import TARGET_TABLES, find_shared_tables
from dpace.drafter.mask_token import check_mask_token
from dpace.drafter.spec import FROM_ANCHOR, find_layer_id_faults
from dpace.system.loading import first_names

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


Probe = Callable[..., Observation | None]
"""Examines a folder, and some keys of it; None where the check does not apply to it, and is not listed."""


class Check(NamedTuple):
    """A named check: what it examines, what to do where that is wrong, and what breaks if nothing is done."""

    name: str
    severity: Literal["fails", "warns"]
    probe: Probe
    fix: str
    breaks: str
    keys: tuple[str, ...] = ()
    """What the probe is given beside the folder."""


def expect_none(names: Sequence[str]) -> Observation:
    """Expect an empty list of faults."""
    return Observation(not names, first_names(names) or "none", "none")


def readable(folder: ExaminedFolder, name: str) -> Observation:
    """Expect that a file could be read."""
    return Observation(name not in folder.problems, folder.problems.get(name, name), "a file that can be read")


def same(found: object, expected: object) -> bool:
    """Whether two values of JSON are equal and of one type: engines refuse 2.0 layers, and count true as 1."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def equal(folder: ExaminedFolder, key: str) -> Observation:
    """Compare a key with that of the config that dpace would write."""
    found, expected = (look_up(config, key) for config in (folder.config, folder.expected_config))
    if expected is None:
        return Observation(None, "the tensors have different lengths")
    return Observation(same(found, expected), found, expected)


def scale(folder: ExaminedFolder, key: str) -> Observation:
    """Compare a scale or cap with the target's, up to rounding in bf16; without the key it changes nothing."""
    neutral = math.inf if key == "final_logit_softcapping" else 1.0
    found, expected = (config.get(key) or neutral for config in (folder.config, folder.expected_config))
    is_equal = found == expected or abs(found / expected - 1) < 1e-2
    return Observation(is_equal, *(ABSENT if value == neutral else value for value in (found, expected)))


def off(folder: ExaminedFolder, *keys: str) -> Observation:
    """Expect that keys are false, null, 1.0 or absent."""
    found = {key: look_up(folder.config, key) for key in keys}
    found = {key: value for key, value in found.items() if value is True or value not in (None, False, 1.0, ABSENT)}
    return Observation(not found, found or "false", "false, null or absent")


def causality(folder: ExaminedFolder, *keys: str) -> Observation:
    """Compare the spellings of causality, where there are any, with that of the training or the published one."""
    found = {key: value for key in keys if (value := look_up(folder.config, key)) not in (None, ABSENT)}
    expected = folder.expected_config.get("is_causal")
    return Observation(all(value is expected for value in found.values()), found, expected)


def window(folder: ExaminedFolder, *keys: str) -> Observation:
    """Compare a window and whether it is used; without one, false, null and absent are the same."""
    found, expected = (
        {key: config.get(key) or None for key in keys} for config in (folder.config, folder.expected_config)
    )
    return Observation(same(found, expected), found, expected)


def mixture(folder: ExaminedFolder, key: str) -> Observation:
    """Look for layers with a window beside layers without one."""
    kinds = str(folder.config.get(key))
    is_mixed = "sliding_attention" in kinds and "full_attention" in kinds
    return Observation(not is_mixed, "with and without a window" if is_mixed else "one kind", "one kind of layer")


def written(folder: ExaminedFolder, *keys: str) -> Observation:
    """Expect keys, whatever their values."""
    return expect_none([f"without {key}" for key in keys if look_up(folder.config, key) == ABSENT])


def agreement(folder: ExaminedFolder) -> Observation:
    """Compare the keys in `dflash_config` with the same keys at the top level."""
    pairs = {key: (value, folder.config[key]) for key, value in folder.nested.items() if key in folder.config}
    return expect_none(
        [f"{key} {inner}, at the top level {top}" for key, (inner, top) in pairs.items() if not same(inner, top)]
    )


def recorded(folder: ExaminedFolder, key: str) -> Observation:
    """Compare a fact that training recorded with the same fact today."""
    before, now = folder.record.get(key, ""), folder.facts.get(key, "")
    if "" in (before, now):
        return Observation(None, "training did not record it" if before == "" else "the target does not say")
    return Observation(before == now, str(now)[:24], f"{str(before)[:24]} as in training")


def as_trained(folder: ExaminedFolder) -> Observation | None:
    """Compare layer ids and block size with the recipe beside the drafter."""
    if "drafter" not in folder.recipe:
        return None
    found = {key: folder.value(key) for key in folder.trained}
    return Observation(same(found, folder.trained), found, f"{folder.trained} in recipe.yaml")


def layer_ids(folder: ExaminedFolder) -> Observation:
    """Look for ids that some engine cannot serve."""
    ids, num_layers = folder.value("target_layer_ids"), folder.target.num_layers
    if any(type(i) is not int for i in ids):
        return Observation(False, ids, "whole numbers, written without a point")
    faults = find_layer_id_faults(ids, num_layers)
    return Observation(not faults, "; ".join([str(ids), *faults]), f"ascending ids in 0 .. {num_layers - 2}")


def layer_offset(folder: ExaminedFolder) -> Observation | None:
    """Look for ids that are the published rule's, shifted by one."""
    ids = folder.value("target_layer_ids")
    num_layers = folder.target.num_layers
    if len(ids) > num_layers - 3 or ("drafter" in folder.recipe and ids == folder.trained["target_layer_ids"]):
        return None
    rule = build_target_layer_ids(num_layers, len(ids))
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


def rope(folder: ExaminedFolder) -> Observation:
    """Compare base and scaling of the rotary embedding with the target's, in each spelling that there is."""
    expected = folder.expected_rope
    wrong = next((rope for rope in (folder.rope, folder.rope | folder.old_rope) if rope != expected), None)
    return Observation(wrong is None, wrong or expected, expected)


def rope_spellings(folder: ExaminedFolder) -> Observation:
    """Look for both spellings of the rotary embedding, since some engines read only one."""
    needed = ["rope_parameters", "rope_theta"] + ["rope_scaling"] * (folder.rope["rope_type"] != "default")
    return expect_none([f"without {key}" for key in needed if not folder.config.get(key)])


def mask_token(folder: ExaminedFolder) -> Observation:
    """Check that the mask token is in the embedding and not in text."""
    token_id = folder.value("mask_token_id")
    if type(token_id) is int:
        check_mask_token(token_id, folder.target)
    return Observation(type(token_id) is int, token_id, "a whole number")


def head_keys(folder: ExaminedFolder) -> Observation | None:
    """Compare the keys of a head with those that dpace would write for its tensors; none may be missing."""
    expected = folder.expected_config["dflash_config"]
    keys = [key for key in {**expected, **folder.nested} if key.startswith(("lilicorr", "projector"))]
    differing = [f"{k} {look_up(folder.nested, k)}" for k in keys if folder.nested.get(k) != expected.get(k)]
    return expect_none(differing) if keys else None


def block_size(folder: ExaminedFolder) -> Observation:
    """Check that a block has a draft slot, and as many as a head scores."""
    found = folder.value("block_size")
    num_drafts = folder.size("draft")
    if num_drafts and found != num_drafts + 1:
        return Observation(False, found, f"{num_drafts + 1}, as the head's tensors have")
    return Observation(type(found) is int and found >= 2, "absent (16)" if found is None else found, "2 or more")


def dtype(folder: ExaminedFolder) -> Observation | None:
    """Compare the dtype of the config with that of the tensors."""
    if not folder.config:
        return None
    named = folder.config.get("dtype", folder.config.get("torch_dtype"))
    found = f"{' and '.join(folder.stored_dtypes)}, in the config {named}"
    return Observation(folder.stored_dtypes == [named], found, "one dtype, the same in the config")


def own_embedding(folder: ExaminedFolder) -> Observation | None:
    """Compare stored tables with the target's, where there are any."""
    shared = find_shared_tables(folder.tensors, folder.target)
    differing = [f"{name}.weight differs" for name, is_shared in shared.items() if not is_shared]
    found = first_names(differing) or "equal"
    return Observation(not differing, found, "equal to the target's, or not stored") if shared else None


def tensor_names(folder: ExaminedFolder) -> Observation:
    """Compare the names of the tensors with the published ones."""
    missing = sorted(folder.axes.keys() - folder.stored.keys())
    unknown = sorted(folder.stored.keys() - folder.axes.keys() - TARGET_TABLES)
    faults = {"without": missing, "with": unknown}
    found = "; ".join(f"{fault} {first_names(names)}" for fault, names in faults.items() if names)
    return Observation(not found, found or "complete", "the published names")


def tensor_values(folder: ExaminedFolder) -> Observation:
    """Look for tensors with NaN or infinity, and for zeros in place of weights."""
    faults = []
    for name in folder.tensors.keys() - SELECTOR_TENSORS.keys() - {"d2t"}:
        tensor = folder.tensors[name]
        if not tensor.isfinite().all():
            faults.append(f"{name} is not finite")
        elif not tensor.any() and ("weight" in name or not name.startswith(lilicorr.PREFIX)):
            faults.append(f"{name} is zero")
    return expect_none(sorted(faults))


def tensor_shapes(folder: ExaminedFolder) -> Observation:
    """Compare the shape of each tensor with what the others, the target and the config say."""
    expected = {name: [folder.expected_axes[axis] for axis in axes] for name, axes in folder.axes.items()}
    found = {name: list(tensor.shape) for name, tensor in folder.tensors.items() if name in expected}
    return expect_none([f"{n} {shape}, not {expected[n]}" for n, shape in found.items() if shape != expected[n]])


def exploded(folder: ExaminedFolder) -> Observation:
    """Look for tensors whose entries are too large to have been trained."""
    limits = {1: MAX_NORM_RMS, 2: MAX_MATRIX_RMS}
    wrong = []
    for name, tensor in folder.tensors.items():
        size = float(tensor.float().square().mean().sqrt())
        if name not in TABLES and limits.get(tensor.dim(), math.inf) < size < math.inf:
            wrong.append(f"{name} {size:.3g}")
    return expect_none(wrong)


COPY_AGAIN = "copy or export the drafter again"
USE_TARGETS = "write the target's value, or take a drafter that was trained for this target"
MAKE_EQUAL = "make both equal: some engines read one, some the other"
FIXED_KEYS = {
    "architectures": "vLLM, SGLang and llama.cpp choose the class by it; convert other layouts with `dpace import`",
    "model_type": "engines choose the class by it; it is qwen3 for every target family",
    "speculators_model_type": "engines read it as another layout; convert it with `dpace import`",
    "hidden_act": "the feed-forward network computes something else",
    "attention_bias": "engines look for biases that are not there",
    "tie_word_embeddings": "a random head is tied to an embedding that is not there",
    "layer_types": "SpecForge needs it; sliding layers lose the text before the window",
}
"""Keys that are the same in every drafter, or follow from its layers, and what breaks where they differ."""
TENSOR_KEYS = {
    "num_hidden_layers": "layers are left out, or random ones added",
    "num_attention_heads": "the projections are cut into other heads",
    "num_key_value_heads": "the projections are cut into other heads",
    "intermediate_size": "the weights do not fit",
    "head_dim": "absent it is 128, in transformers and in llama.cpp's converter",
    "dflash_config.conv_kernel_size": "engines read other taps than the tensors have",
    "dflash_config.conv_group_size": "engines read other groups of channels than the tensors have",
}
"""Keys that the tensors decide."""
TARGET_KEYS = {
    "hidden_size": "the target's hidden states, embedding and head do not fit",
    "vocab_size": "engines size the draft's logits by it",
    "num_target_layers": "z-lab's code reads it even where ids are given; ollama compares it",
}
"""Keys that the target decides."""
SCALES = {
    "final_logit_softcapping": "sampled drafts and confidences are wrong: the target caps its logits, or does not",
    "input_embedding_scale": "the drafter reads other embeddings than in training (Gemma scales them)",
    "output_multiplier": "logits are scaled otherwise than in training",
}
"""Keys that are there only where the target scales or caps something."""

FILE_CHECKS = (
    Check("config readable", "fails", readable, COPY_AGAIN, "nothing loads", ("config.json",)),
    Check(
        "weights readable",
        "fails",
        readable,
        COPY_AGAIN,
        "nothing loads; a truncated copy is the usual cause",
        ("model.safetensors",),
    ),
    Check(
        "recipe readable",
        "warns",
        readable,
        "copy it again, or delete it",
        "the checks against the training are lost",
        ("recipe.yaml",),
    ),
)
CONFIG_CHECKS = (
    *(
        Check(key, "fails", probe, fix, breaks, (key,))
        for probe, fix, group in (
            (equal, "write the expected value", FIXED_KEYS),
            (equal, "write what the tensors have", TENSOR_KEYS),
            (equal, USE_TARGETS, TARGET_KEYS),
            (scale, USE_TARGETS, SCALES),
        )
        for key, breaks in group.items()
    ),
    Check(
        "head keys",
        "fails",
        head_keys,
        "write all keys of the head, as the tensors have them",
        "another scale or size loads without an error, and drafts are worse; without them the head is left out",
    ),
    Check(
        "engine",
        "warns",
        lambda folder: expect_none([k for k in SCALES if folder.engine == "vllm" and k in folder.config]),
        "use another engine: vLLM's V1 runner does not read these keys",
        "vLLM's V1 runner ignores the keys of scales and caps",
    ),
    Check(
        "engine, slots",
        "fails",
        lambda folder: expect_none(
            [k for k in FROM_ANCHOR if folder.engine not in (None, "llamacpp") and folder.value(k)]
        ),
        "decode with dpace, or export with --to gguf for llama.cpp",
        "other engines read drafts from the second slot on",
    ),
    Check(
        "engine, head",
        "fails",
        lambda folder: expect_none(
            [k for k in ("lilicorr_enabled",) if folder.engine in lilicorr.UNREAD_ENGINES and folder.nested.get(k)]
        ),
        "use vLLM, SGLang or TensorRT-LLM, or write it without its head: dpace export --plain",
        "other engines draft without the head",
    ),
    Check(
        "keys written",
        "warns",
        written,
        "write the values of the training at the top level: without them engines assume others",
        "engines assume an epsilon of 1e-6, differ on causality, and some look for the block size here only",
        ("rms_norm_eps", "block_size", "is_causal"),
    ),
    Check(
        "rope",
        "fails",
        rope,
        "write the target's values in rope_parameters, rope_theta and rope_scaling",
        "positions are read wrongly: acceptance falls with the length of the text",
    ),
    Check(
        "rope spellings",
        "warns",
        rope_spellings,
        "write both spellings: an engine that reads only the other one assumes 10000",
        "engines that read the other of `rope_parameters` (new) and `rope_theta` (old) assume 10000",
    ),
    Check(
        "rope layout",
        "fails",
        off,
        "remove these keys: the layout rotates halves of whole heads",
        "the layout rotates the halves of whole heads; this target rotates pairs or a part",
        (
            "rope_interleaved",
            "partial_rotary_factor",
            "rope_parameters.rope_interleaved",
            "rope_parameters.partial_rotary_factor",
        ),
    ),
    Check(
        "dflash_config",
        "fails",
        written,
        "write both keys there: vLLM reads no others, and takes other layers without them",
        "vLLM reads ids and mask token here only, and silently takes other layers",
        (
            "dflash_config.target_layer_ids",
            "dflash_config.mask_token_id",
        ),
    ),
    Check("keys agree", "fails", agreement, MAKE_EQUAL, "engines differ in which of both places they read"),
    Check(
        "layer ids",
        "fails",
        layer_ids,
        "count layers from 0; sort ids together with the columns of fc; train without the last layer",
        "vLLM sorts the ids but not the columns of `fc`: nearly nothing is accepted. The last layer's output is "
        "normalized in transformers, not in vLLM; SGLang never captures it, llama.cpp aborts",
    ),
    Check(
        "layer ids offset",
        "warns",
        layer_offset,
        "undo the shift: this layout writes i where speculators and GGUF write i + 1",
        "hidden states of a neighbor layer: layer `i` is `i` here and `i + 1` in speculators and GGUF",
    ),
    Check(
        "as trained",
        "fails",
        as_trained,
        "write the layer ids and the block size of the training: draft tokens + 1",
        "hidden states come from layers that the drafter has never seen, or blocks have another length",
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
    Check(
        "mask_embedding.pt",
        "warns",
        lambda folder: expect_none([path.name for path in folder.path.glob("mask_embedding.pt")]),
        "write the target's embedding with this row at mask_token_id as embed_tokens.weight, and remove the file",
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
        "is_causal",
        "fails",
        causality,
        "write the value of the training: false where the slots of a block see each other",
        "slots see other slots than in training",
        (
            "is_causal",
            "dflash_config.causal",
            "dflash_config.is_causal",
        ),
    ),
    Check(
        "sliding window",
        "warns",
        window,
        "write the window of the training and true where there are sliding layers, else null and false",
        "transformers drops a window that is not used; engines may cut the context at one that is not of the training",
        (
            "use_sliding_window",
            "sliding_window",
        ),
    ),
    Check(
        "mixed layers",
        "warns",
        mixture,
        "set VLLM_USE_V2_MODEL_RUNNER=1 for vLLM, or train without --drafter.full-layers",
        "vLLM's V1 runner refuses layers with a window beside layers without one",
        ("layer_types",),
    ),
    Check(
        "target",
        "warns",
        recorded,
        "name the target that the drafter was trained for, in the same variant (base or instruct)",
        "base and instruct models, or two sizes, are confused",
        ("target",),
    ),
    Check(
        "target dtype",
        "warns",
        recorded,
        "expect slightly different accepted lengths",
        "hidden states are rounded differently",
        ("dtype",),
    ),
    Check(
        "tokenizer",
        "fails",
        recorded,
        "use the tokenizer that the drafter was trained with",
        "ids mean other tokens",
        ("tokenizer_sha256",),
    ),
    Check(
        "chat template",
        "warns",
        recorded,
        "use the template of the training, or train on responses with this one",
        "the drafter has not seen such text",
        ("chat_template_sha256",),
    ),
    Check(
        "thinking",
        "warns",
        recorded,
        "turn thinking on or off as in training (here --thinking), or train on such responses",
        "a drafter trained without thinking accepts less than half with it",
        ("thinking",),
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
        tensor_names,
        "copy or export the drafter again; `dpace import` renames tensors, and others are to be removed",
        "most engines know the published names only: random weights, or a refusal",
    ),
    Check(
        "own embedding",
        "warns",
        own_embedding,
        "keep it if the drafter was trained with it, and serve with dpace, vLLM or llama.cpp; else remove it",
        "dpace, vLLM and llama.cpp draft with it, other engines with the target's table",
    ),
    Check(
        "tensor shapes",
        "fails",
        tensor_shapes,
        "copy or export again: tensors are swapped, transposed or from another drafter",
        "nothing loads, or swapped tensors do",
    ),
    Check(
        "tensor values",
        "fails",
        tensor_values,
        "copy or export the drafter again, or take an earlier checkpoint",
        "a layer does nothing, or no draft is ever accepted",
    ),
    Check(
        "exploded tensors",
        "warns",
        exploded,
        "take an earlier checkpoint; train with a lower learning rate",
        "drafts are near random; overflow in half precision",
    ),
)
