"""Check a drafter's files: whether they can be read, fit one another, and have the published layout.

What comes in are the files, the target and the engine that will serve; what comes out is a `Diagnosis` for each check.
No network is run.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

from dpace.config import DrafterConfig
from dpace.drafter import Drafter
from dpace.drafter.drafter import TARGET_TABLES, attention_of, facts_of, find_shared_tables
from dpace.drafter.spec import DrafterSpec, own_tables, read_rope
from dpace.engines import EngineName, engine_of
from dpace.engines.folder import UNREADABLE, DrafterFolder, mapping
from dpace.engines.published import make_drafter
from dpace.recipes.validation import from_json
from dpace.system.device import dtype_name
from dpace.system.progress import one_line
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes

Made = TypeVar("Made")
Result = Literal["passes", "warns", "fails", "skipped"]
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
RECIPE = "recipe.yaml"
MAX_SHOWN = 300
"""Characters of a value that the table shows."""
COPY_AGAIN = "copy or export the drafter again"
WRITE = "write the expected value"
SPELLINGS = {"rope_parameters": ["rope_parameters"], "rope_theta": ["rope_theta", "rope_scaling"]}
"""Keys of the rotary embedding, by the first one of each spelling: an engine reads one spelling or the other."""
NEUTRAL = ("None", "False", "1.0", "")
"""Values that say no more than a missing key."""
SAID = ("is_causal", "thinking")
"""Keys for which these values do say something."""


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


class Keys(NamedTuple):
    """Keys of the config that are compared alike; `group.key` is a key in an object."""

    names: str
    if_other: Result
    """The result for another value."""
    if_absent: Result
    """The result for a value that only one side has."""
    fix: str


COMPARED = (
    Keys(
        "architectures model_type tie_word_embeddings num_hidden_layers rope_interleaved partial_rotary_factor "
        "dflash_config.target_layer_ids dflash_config.mask_token_id dflash_config.lilicorr_enabled "
        "dflash_config.projector_type",
        "fails",
        "fails",
        WRITE,
    ),
    Keys(
        "block_size is_causal layer_types rms_norm_eps rope_parameters rope_theta",
        "fails",
        "warns",
        f"{WRITE}: where it is missing, engines take different ones",
    ),
    Keys(
        "hidden_size vocab_size num_target_layers input_embedding_scale output_multiplier final_logit_softcapping",
        "fails",
        "fails",
        "name the target of the training, or write this target's value",
    ),
    Keys("dtype sliding_window use_sliding_window", "warns", "warns", WRITE),
    Keys("dpace.tokenizer_sha256", "fails", "skipped", "use the tokenizer of the training: ids mean other tokens"),
    Keys(
        "dpace.target dpace.dtype dpace.chat_template_sha256 dpace.thinking",
        "warns",
        "skipped",
        "take the target as it was in training (here --target and --thinking), or expect shorter drafts",
    ),
)
"""Keys that are compared with the published layout, with the target, and under `dpace` with what training recorded."""


def shown(value: object) -> str:
    """Return a value as one line of the table; a config may hold any text."""
    text = "absent" if value is None else one_line(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def attempt(check: str, action: Callable[[], Made]) -> tuple[Made | None, Diagnosis]:
    """Do something, and say whether it was possible; in messages of dpace, what to do stands behind a semicolon."""
    try:
        return action(), Diagnosis(check, "passes")
    except UNREADABLE as error:
        reason, _, fix = (str(error) or type(error).__name__).partition("; ")
        return None, Diagnosis(check, "fails", shown(reason), "", shown(fix or COPY_AGAIN))


def check_files(files: DrafterFolder, target: Target, engine: EngineName | None) -> list[Diagnosis]:
    """Check all that shows without running the drafter.

    A damaged file is one failure, and what needs it is left out.
    """
    found = {name: Diagnosis(name, "fails", problem, "", COPY_AGAIN) for name, problem in files.problems.items()}
    compared = []
    values = {"rms_norm_eps": 1e-6, **own_tables(files.tensors), **files.config}
    spec = None
    if CONFIG not in found:
        spec, found[CONFIG] = attempt(CONFIG, lambda: DrafterSpec.from_config(values))
    if spec is not None:
        trained = None
        if RECIPE not in found:
            trained, found[RECIPE] = attempt(RECIPE, lambda: replace_trained(spec, files, target))
        compared += [*compare(files, trained or spec, target), *check_engine(spec, engine)]
        if WEIGHTS not in found:
            drafter, found[WEIGHTS] = attempt(WEIGHTS, lambda: load_stored(spec, files))
            compared += check_tables(files, target) if drafter else []
    if RECIPE in found and found[RECIPE].result == "fails":
        found[RECIPE] = found[RECIPE]._replace(result="warns")  # engines do not read it
    return [*found.values(), *compared]


def load_stored(spec: DrafterSpec, files: DrafterFolder) -> Drafter:
    """Make the drafter, without tables of the target that are stored beside its tensors.

    Raises:
        ValueError: tensors or sizes that no drafter has.
    """
    unused = TARGET_TABLES - spec.shapes.keys()
    return make_drafter(spec, {name: tensor for name, tensor in files.stored.items() if name not in unused})


def replace_trained(spec: DrafterSpec, files: DrafterFolder, target: Target) -> DrafterSpec:
    """Give a spec the values that the recipe beside the drafter says, where there is one.

    Raises:
        ValueError: options that no drafter has.
    """
    if "drafter" not in files.recipe:
        return spec
    config = from_json(DrafterConfig, files.recipe["drafter"])
    return replace(
        spec,
        num_layers=config.num_layers,
        block_size=config.block_size,
        target_layer_ids=tuple(Drafter.layer_ids(target, config)),
        sample_from_anchor=False,
        **attention_of(config),
    )


def compare(files: DrafterFolder, trained: DrafterSpec, target: Target) -> Iterator[Diagnosis]:
    """Compare the config with the one that dpace would write for this target."""
    own = replace(trained, **facts_of(target), special_token_ids={})
    expected = own.published(own.config().to_dict()) | dict.fromkeys(SPELLINGS, own.rope)
    config = {name: value for name, value in files.config.items() if name not in SPELLINGS}
    config = {"dtype": config.get("torch_dtype"), **config, **read_spellings(files.config)}
    stored = {dtype_name(tensor.dtype) for tensor in files.tensors.values() if tensor.is_floating_point()}
    facts = {"target": target.short_name, "dtype": dtype_name(target.model.dtype), "thinking": target.thinking}
    expected["dtype"] = " and ".join(sorted(stored)) or config["dtype"]
    expected["dpace"] = facts | tokenizer_hashes(target)
    for keys in COMPARED:
        for key in keys.names.split():
            value, right = look_up(config, key), look_up(expected, key)
            is_near = isinstance(value, float) and isinstance(right, float) and math.isclose(value, right, rel_tol=1e-2)
            if is_near or value == right:
                yield Diagnosis(key, "passes")
            else:
                result = keys.if_absent if None in (value, right) else keys.if_other
                if key == "block_size" and value is None and look_up(config, "dflash_config.block_size") is None:
                    result = "fails"  # engines refuse the folder, or take 16
                yield Diagnosis(key, result, shown(value), shown(right), "" if result == "skipped" else keys.fix)


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
        config = mapping(config.get(group))
    value = config.get(key)
    return None if str(value) in NEUTRAL and key not in SAID else value


def check_engine(spec: DrafterSpec, engine: EngineName | None) -> Iterator[Diagnosis]:
    """Say what the engine that will serve the drafter does not read."""
    if engine is None:
        return
    results: dict[Result, str] = {"fails": engine_of(engine).fault(spec), "warns": engine_of(engine).doubt(spec)}
    for result, reason in results.items():
        found, _, fix = reason.partition("; ")
        if reason:
            yield Diagnosis(f"engine: {engine}", result, found, "", fix)
    if not any(results.values()):
        yield Diagnosis(f"engine: {engine}", "passes")


def check_tables(files: DrafterFolder, target: Target) -> list[Diagnosis]:
    """Compare an embedding and a head of the drafter's own with the target's."""
    fix = "keep it if it was trained so, and serve with dpace, vLLM or llama.cpp: other engines take the target's"
    return [
        Diagnosis(f"own {name}", "warns", "another one than the target's", "the target's, or none", fix)
        for name, is_shared in find_shared_tables(files.tensors, target).items()
        if not is_shared
    ]
