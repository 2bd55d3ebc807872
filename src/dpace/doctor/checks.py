"""Check a drafter's files: whether they can be read, fit one another, and have the published layout.

What comes in are the files, the target and the engine that will serve; what comes out is a `Diagnosis` for each check.
No network is run.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from dpace.drafter.drafter import facts_of, find_shared_tables, make_drafter
from dpace.drafter.spec import DrafterSpec, own_tables, read_quantized, read_rope, read_tensors
from dpace.drafter.values import read_object
from dpace.engines import EngineName, engine_of
from dpace.system.device import dtype_name
from dpace.system.loading import read_config
from dpace.system.progress import one_line
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes

Made = TypeVar("Made")
Result = Literal["passes", "warns", "fails", "skipped"]
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MAX_SHOWN = 300
"""Characters of a value that the table shows."""
KEEP = "keep it if it was trained so, and serve with dpace, vLLM or llama.cpp: other engines take the target's"
WRITE = "write the expected value"
SPELLINGS = {"rope_parameters": ["rope_parameters"], "rope_theta": ["rope_theta", "rope_scaling"]}
"""Keys of the rotary embedding, by the first one of each spelling: an engine reads one spelling or the other."""
NEUTRAL = ("None", "False", "1.0", "")
"""Values that say no more than a missing key."""
SAID = ("is_causal", "thinking")
"""Keys for which these values do say something."""
COMPARED: list[tuple[str, Result, Result, str]] = [
    (
        "architectures model_type tie_word_embeddings num_hidden_layers rope_interleaved partial_rotary_factor "
        "dflash_config.target_layer_ids dflash_config.mask_token_id dflash_config.lilicorr_enabled "
        "dflash_config.projector_type",
        "fails",
        "fails",
        WRITE,
    ),
    (
        "block_size is_causal layer_types rms_norm_eps rope_parameters rope_theta",
        "fails",
        "warns",
        f"{WRITE}: where it is missing, engines take different ones",
    ),
    (
        "hidden_size vocab_size num_target_layers input_embedding_scale output_multiplier final_logit_softcapping",
        "fails",
        "fails",
        "name the target of the training, or write this target's value",
    ),
    ("dtype sliding_window use_sliding_window", "warns", "warns", WRITE),
    ("dpace.tokenizer_sha256", "fails", "skipped", "use the tokenizer of the training: ids mean other tokens"),
    (
        "dpace.target dpace.dtype dpace.chat_template_sha256 dpace.thinking",
        "warns",
        "skipped",
        "take the target as it was in training (here --target and --thinking), or expect shorter drafts",
    ),
]
"""Keys that are compared with the published layout, with the target, and under `dpace` with what training recorded.

Beside them: the result for another value, that for a value which only one side has, and what to do."""


class Diagnosis(NamedTuple):
    """The result of one check."""

    check: str
    result: Result
    """`fails`: engines refuse the folder or draft badly. `warns`: only some do, or it may be intended.

    `skipped`: it cannot be decided."""
    found: str = ""
    expected: str = ""
    fix: str = ""
    """What to do, in one line; empty where there is nothing to do."""


def shown(value: object) -> str:
    """Return a value as one line of the table; a config may hold any text."""
    return "absent" if value is None else one_line(value)[:MAX_SHOWN]


def attempt(check: str, action: Callable[[], Made]) -> tuple[Made | None, Diagnosis]:
    """Do something, and say whether it was possible; in messages of dpace, what to do stands behind a semicolon."""
    try:
        return action(), Diagnosis(check, "passes")
    except (ValueError, OSError, MemoryError) as error:
        reason, _, fix = str(error).partition("; ")
        return None, Diagnosis(check, "fails", shown(reason), "", shown(fix or "copy or export the drafter again"))


def check_files(folder: Path, target: Target) -> tuple[DrafterSpec | None, list[Diagnosis]]:
    """Read a drafter's files, and check all that shows without running it.

    A damaged file is one failure, and what needs it is left out.

    Returns:
        What the config says, or None where it cannot be read; and the checks.
    """
    config, of_config = attempt(CONFIG, lambda: read_config(folder))
    tensors, of_weights = attempt(WEIGHTS, lambda: read_tensors(folder))
    if config is None:
        return None, [of_config, of_weights]
    spec, of_config = attempt(CONFIG, lambda: DrafterSpec.from_config(own_tables(tensors or {}) | config))
    if spec is None:
        return None, [of_config, of_weights]
    tables = {}
    stored = tensors or {}
    if quantized := read_object(config, "quantization_config"):
        stored = {}
        tensors, of_weights = attempt(WEIGHTS, lambda: read_quantized(folder, spec, quantized))
    if tensors is not None:
        drafter, of_weights = attempt(WEIGHTS, lambda: make_drafter(spec, tensors))
        tables = find_shared_tables(tensors, target) if drafter else {}
    other = Diagnosis("", "warns", "another one than the target's", "the target's, or none", KEEP)
    own = [other._replace(check=f"own {name}") for name, is_shared in tables.items() if not is_shared]
    return spec, [of_config, of_weights, *compare(spec, config, stored, target), *own]


def compare(
    spec: DrafterSpec, found: dict[str, Any], tensors: Mapping[str, Tensor], target: Target
) -> Iterator[Diagnosis]:
    """Compare a config with the one that dpace would write of its spec for this target."""
    own = replace(spec, **facts_of(target), special_token_ids={})
    expected = own.published(own.config().to_dict()) | dict.fromkeys(SPELLINGS, own.rope_parameters)
    config = {"dtype": found.get("torch_dtype"), **found, **dict.fromkeys(SPELLINGS), **read_spellings(found)}
    stored = {dtype_name(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()}
    facts = {"target": target.short_name, "dtype": dtype_name(target.model.dtype), "thinking": target.thinking}
    expected["dtype"] = " and ".join(sorted(stored)) or config["dtype"]
    expected["dpace"] = facts | tokenizer_hashes(target)
    for names, if_other, if_absent, fix in COMPARED:
        for key in names.split():
            value = look_up(config, key)
            right = look_up(expected, key)
            are_numbers = all(isinstance(one, float) for one in (value, right))
            if value == right or are_numbers and math.isclose(value, right, rel_tol=1e-2):
                yield Diagnosis(key, "passes")
                continue
            result = if_absent if None in (value, right) else if_other
            if key == "block_size" and look_up(config, "dflash_config.block_size") is None:
                result = "fails"  # where it is absent, engines refuse the folder, or take 16
            yield Diagnosis(key, result, shown(value), shown(right), "" if result == "skipped" else fix)


def read_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding as each spelling alone says it; spellings that say nothing are left out."""
    found = {}
    for key, names in SPELLINGS.items():
        with contextlib.suppress(ValueError):
            found[key] = read_rope({name: config.get(name) for name in names})
    return found


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """Return the value of a key, or of `group.key`; None where it says no more than a missing key."""
    *groups, key = path.split(".")
    for group in groups:
        config = read_object(config, group)
    value = config.get(key)
    return None if str(value) in NEUTRAL and key not in SAID else value


def check_engine(spec: DrafterSpec, name: EngineName) -> Diagnosis:
    """Say what the engine that will serve the drafter does not read."""
    engine = engine_of(name)
    fault = engine.fault(spec)
    found, _, fix = (fault or engine.doubt(spec)).partition("; ")
    return Diagnosis(f"engine: {name}", "fails" if fault else "warns" if found else "passes", found, "", fix)
