"""Examine a drafter's folder by named checks of what would go wrong when it is served.

What comes in is a folder and its target; what goes out is a `Diagnosis` for each check. First come checks of the
files: whether they can be read, fit one another, and have the published layout. Then the drafter is loaded for the
target, and its tau is measured as the config says and as other values would have it. `dpace check` decodes with it.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from dpace.batches.dataset import ResponseDataset
from dpace.config import EngineName, Recipe
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.drafter import facts_of, find_shared_tables, make_drafter
from dpace.drafter.spec import DrafterSpec, are_servable, own_tables, read_rope, read_tensors
from dpace.drafter.values import read_group
from dpace.engines import engine_of
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance, tau_gain
from dpace.recipes.recipe_file import read_recipe
from dpace.respond.responses import Response, read_responses
from dpace.system.device import dtype_name
from dpace.system.ledger import JsonObject
from dpace.system.loading import read_config
from dpace.system.progress import count, one_line
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes
from dpace.training.checkpoints import WEIGHTS

Made = TypeVar("Made")
Result = Literal["passes", "warns", "fails", "skipped"]
CONFIG = "config.json"
MAX_SHOWN = 300
"""Characters of a value that the table shows."""
KEEP = "keep it if it was trained so, and serve with dpace, vLLM or llama.cpp: other engines take the target's"
WRITE = "write the expected value, or name the target of the training"
AS_TRAINED = "take the target as it was in training (here --target and --thinking), or expect shorter drafts"
SPELLINGS = {"rope_parameters": ["rope_parameters"], "rope_theta": ["rope_theta", "rope_scaling"]}
"""Keys of the rotary embedding, by the first one of each spelling: an engine reads one spelling or the other."""
NEUTRAL = ("None", "False", "1.0", "")
"""Values that say no more than a missing key."""
SAID = ("is_causal", "thinking")
"""Keys for which these values do say something."""


class KeyRule(NamedTuple):
    """What a wrong value of some keys of a config means."""

    keys: tuple[str, ...]
    if_other: Result
    """For another value than the expected one."""
    if_absent: Result
    """For a value that only the config has, or only what it is compared with."""
    fix: str = WRITE


COMPARED = [
    KeyRule(
        (
            "architectures",
            "model_type",
            "block_size",
            "tie_word_embeddings",
            "num_hidden_layers",
            "partial_rotary_factor",
            "dflash_config.target_layer_ids",
            "dflash_config.mask_token_id",
            "dflash_config.lilicorr_enabled",
            "dflash_config.projector_type",
            "hidden_size",
            "vocab_size",
            "num_target_layers",
            "input_embedding_scale",
            "output_multiplier",
            "final_logit_softcapping",
        ),
        "fails",
        "fails",
    ),
    KeyRule(("is_causal", "layer_types", "rms_norm_eps", "rope_parameters", "rope_theta"), "fails", "warns"),
    KeyRule(("dtype", "sliding_window", "use_sliding_window"), "warns", "warns"),
    KeyRule(("dpace.tokenizer_sha256",), "fails", "skipped", AS_TRAINED),
    KeyRule(
        ("dpace.target", "dpace.dtype", "dpace.chat_template_sha256", "dpace.thinking"), "warns", "skipped", AS_TRAINED
    ),
]
"""Keys that are compared with the published layout, with the target, and under `dpace` with what training recorded."""
MAX_ANSWERS = 24
"""Answers that two ways of reading a drafter are compared on."""
KEPT_BYTES = 1e9
"""Most bytes of their hidden states that are kept in memory."""
MIN_TAU = 1.1
"""Lowest useful mean acceptance length, in tokens per verification; decoding without a drafter gives 1."""
LEAST_GAIN = {"sample_from_anchor": 0.2, "is_causal": 0.02, "target_layer_ids": 0.02}
"""Least gain of tau by which another way of reading a drafter is taken to be the one that it was trained in.
Shifted slots cost a trained drafter most of its tau. A drafter that has learned little gains a little by a shift."""
MAX_TAU_CHANGE = 0.01
"""Largest relative change of tau on the same responses in fp32, where only rounding differs."""
Outcome = tuple[Result, *tuple[str, ...]]
"""Result, what was found, and where it is wrong what was expected and what to do; see `Diagnosis`."""


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


def attempt(check: str, action: Callable[..., Made], *arguments: Any) -> tuple[Made | None, Diagnosis]:
    """Call a function, and say whether it raised no error."""
    try:
        return action(*arguments), Diagnosis(check, "passes")
    except (ValueError, OSError, MemoryError) as error:
        reason, _, fix = str(error).partition("; ")  # in messages of dpace, what to do stands after a semicolon
        return None, Diagnosis(check, "fails", shown(reason), "", shown(fix or "copy or export the drafter again"))


def check_files(folder: Path, target: Target) -> tuple[DrafterSpec | None, list[Diagnosis]]:
    """Read a drafter's files, and check all that shows without running it.

    A damaged file is one failure, and what needs it is left out.

    Returns:
        What the config says, or None where it cannot be read; and the checks.
    """
    config, config_check = attempt(CONFIG, read_config, folder)
    tensors, weights_check = attempt(WEIGHTS, read_tensors, folder)
    stored = tensors or {}
    spec = None
    if config is not None:
        spec, config_check = attempt(CONFIG, DrafterSpec.from_config, own_tables(stored) | config)
    if config is None or spec is None:
        return None, [config_check, weights_check]
    are_shared = {}
    if tensors is not None:
        drafter, weights_check = attempt(WEIGHTS, make_drafter, spec, tensors)
        if drafter and spec.vocab_size == len(target.head.weight):
            are_shared = find_shared_tables(tensors, target)
    checks = [config_check, weights_check, *compare_config(spec, config, stored, target)]
    changes = {}
    for table, is_shared in are_shared.items():
        if is_shared:
            changes[f"has_own_{table}"] = False  # an engine may leave the copy out
        else:
            checks.append(
                Diagnosis(f"own {table}", "warns", "another one than the target's", "the target's, or none", KEEP)
            )
    return replace(spec, **changes), checks


def compare_config(
    spec: DrafterSpec, config: JsonObject, tensors: Mapping[str, Tensor], target: Target
) -> Iterator[Diagnosis]:
    """Compare a config with the one that dpace would write of its spec for this target."""
    ideal = replace(spec, **facts_of(target))
    expected = ideal.published(ideal.config().to_dict()) | dict.fromkeys(SPELLINGS, ideal.rope_parameters)
    facts = {"target": target.short_name, "dtype": target.dtype_name, "thinking": target.thinking}
    expected["dpace"] = facts | tokenizer_hashes(target)
    found = {"dtype": config.get("torch_dtype"), **config}  # the older name of the key
    for key, names in SPELLINGS.items():
        # Each spelling is read as if the other one were not there; None where it says nothing that can be read.
        found[key], _ = attempt(key, read_rope, {name: config.get(name) for name in names})
    dtypes = {dtype_name(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()}
    expected["dtype"] = " and ".join(sorted(dtypes)) or found["dtype"]
    for rule in COMPARED:
        for key in rule.keys:
            value = look_up(found, key)
            expected_value = look_up(expected, key)
            are_numbers = isinstance(value, float) and isinstance(expected_value, float)
            if value == expected_value or are_numbers and math.isclose(value, expected_value, rel_tol=1e-2):
                yield Diagnosis(key, "passes")
                continue
            result = rule.if_absent if value is None or expected_value is None else rule.if_other
            yield Diagnosis(key, result, shown(value), shown(expected_value), "" if result == "skipped" else rule.fix)


def look_up(config: JsonObject, path: str) -> Any:
    """Return the value of a key, or of `group.key`; None where it says no more than a missing key."""
    *groups, key = path.split(".")
    for group in groups:
        config = read_group(config, group)
    value = config.get(key)
    return None if str(value) in NEUTRAL and key not in SAID else value


@dataclass
class Trial:
    """A drafter that is run, and what it is measured on."""

    target: Target
    folder: Path
    spec: DrafterSpec
    """What its config says."""
    responses: list[Response]

    @cached_property
    def drafter(self) -> Drafter:
        """The drafter, loaded as for decoding."""
        return load_drafter(self.folder, self.target)

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe of its training; None where there is none that can be read."""
        recipe, _ = attempt("recipe", read_recipe, self.folder / "recipe.yaml")
        return recipe

    @cached_property
    def answers(self) -> ResponseDataset:
        """The first responses; their hidden states are computed once."""
        answers = self.cut(self.responses[:MAX_ANSWERS])
        answers.keep_features(self.target, self.spec.target_layer_ids, limit_bytes=KEPT_BYTES)
        return answers

    @cached_property
    def acceptance(self) -> Acceptance:
        """Accepted lengths on the first responses, as the config says."""
        return self.measure(self.answers)

    @cached_property
    def on_recorded(self) -> Acceptance | None:
        """Accepted lengths on the responses that the record names; None where none of them is there."""
        ids = self.spec.record.get("tau_responses", [])
        recorded = [response for response in self.responses if response.id in ids]
        return self.measure(self.cut(recorded)) if recorded else None

    def cut(self, responses: list[Response]) -> ResponseDataset:
        """Cut responses as in training."""
        longest = self.recipe.train.max_length if self.recipe else 10**9
        return ResponseDataset(responses, max_length=longest, num_anchors=None, seed=0)

    def measure(self, answers: ResponseDataset, **changes: Any) -> Acceptance:
        """Measure accepted lengths where the config's values are these; the drafter stays as it was."""
        spec = replace(self.spec, **changes)
        if spec.target_layer_ids != self.spec.target_layer_ids:
            answers = copy.copy(answers)
            answers.features = None  # of other layers
        read_as(self.drafter, spec)
        try:
            return heldout_acceptance(self.drafter, self.target, answers, title="measuring tau")
        finally:
            read_as(self.drafter, self.spec)


def read_as(drafter: Drafter, spec: DrafterSpec) -> None:
    """Let a drafter have the slots, the causality and the layers of another spec."""
    drafter.config.dflash_config["sample_from_anchor"] = spec.sample_from_anchor
    drafter.config.target_layer_ids = list(spec.target_layer_ids)
    for layer in drafter.layers:
        attention: Any = layer.self_attn
        attention.is_causal = spec.is_causal
        if spec.is_causal == "sliding":  # only layers with a window are
            attention.is_causal = attention.kind == "sliding_attention"


def load(trial: Trial) -> Outcome:
    """Load the drafter as it is to be run."""
    return "passes", f"{trial.drafter.num_parameters():,} parameters"


def accept_drafts(trial: Trial) -> Outcome:
    """Compare tau with what training recorded, and with the lowest useful one.

    On the recorded responses in fp32, where nothing is left to chance, it may differ by `MAX_TAU_CHANGE`. Elsewhere it
    has to reach the recorded interval.
    """
    record = trial.spec.record
    on_recorded = trial.on_recorded
    if on_recorded:
        tau = on_recorded.tau
        found = f"tau {tau:.3f} on the responses of the training"
    else:
        tau = trial.acceptance.tau
        found = f"tau {tau:.3f}"
    low = record.get("tau_interval", [None])[0]
    high = math.inf
    # The same answers, cut at the same length (which the recipe tells), without rounding to bf16.
    is_exact = record.get("dtype") == trial.target.dtype_name in ("float32", "int8")
    is_whole = on_recorded and len(on_recorded.rows) == len(record["tau_responses"])
    if is_exact and trial.recipe and is_whole:
        low = record["tau"] * (1 - MAX_TAU_CHANGE)
        high = record["tau"] * (1 + MAX_TAU_CHANGE)
    if low is not None and not low <= tau <= high:
        fix = "name the target of the training, or copy the drafter again: one of them is another one"
        return "fails", found, f"{low:.3f} to {high:.3f}", fix
    if tau < MIN_TAU:
        return "warns", found, f"{MIN_TAU} or more", "train longer, or for this target"
    return "passes", found


def compare_ways(trial: Trial, *, key: str) -> Outcome:
    """Measure tau on the same answers as if the config had another value, and fail where that is better.

    The interval of the paired gain over answers has to lie above `LEAST_GAIN`, and drafts have to be accepted at all.
    A config with which tau is what training recorded is right: a drafter that has learned little may gain by others.
    """
    best: Acceptance | None = None
    best_value = ""
    for value in other_values(trial.spec, key):
        acceptance = trial.measure(trial.answers, **{key: value})
        if best is None or acceptance.tau > best.tau:
            best = acceptance
            best_value = json.dumps(value)
    if best is None:
        return "skipped", "this drafter can be read in one way only"
    found = f"tau {trial.acceptance.tau:.2f} as the config says, {best.tau:.2f} with {best_value}"
    _, low, high = tau_gain([best], [trial.acceptance])
    is_better = low > LEAST_GAIN[key]
    is_worse = high < 0
    if max(best.tau, trial.acceptance.tau) < MIN_TAU or not (is_better or is_worse):
        return "skipped", f"{found}: cannot be told apart on {count(len(trial.answers), 'answer')}"
    if is_worse or "tau" in trial.spec.record and accept_drafts(trial)[0] == "passes":
        return "passes", found
    fix = f'write "{key}": {best_value} into config.json, also where dflash_config has it'
    return "fails", found, best_value, fix


def other_values(spec: DrafterSpec, key: str) -> list[Any]:
    """Return the values of a key that a drafter may have been trained with instead."""
    if key == "target_layer_ids":
        values = []
        for step in (1, -1):  # whether the embedding counts as a layer is what projects disagree on
            layer_ids = tuple(layer + step for layer in spec.target_layer_ids)
            if are_servable(layer_ids, spec.num_target_layers):
                values.append(layer_ids)
        return values
    if spec.selector and key in spec.selector.refused:
        return []  # such a selector has no vector for the slot that blocks would have more
    return [not getattr(spec, key)]


Check = Callable[[Trial], Outcome]
MEASURED: dict[str, Check] = {"accepted length": accept_drafts}
"""Checks that need answers of the target."""
for _key in LEAST_GAIN:
    MEASURED[f"measured {_key}"] = partial(compare_ways, key=_key)
LOADS = "loads for the target"
RUN: dict[str, Check] = {LOADS: load, **MEASURED}
"""Checks that run the drafter, in this order."""
NEEDED = {CONFIG, WEIGHTS, LOADS}
"""Checks without which nothing is run: the drafter might not fit into memory."""


def diagnose(
    folder: str | Path, target: Target, *, engine: EngineName | None = None, responses: str | Path | None = None
) -> Iterator[Diagnosis]:
    """Examine a drafter's folder: first the files on disk, then the drafter as it runs.

    One failed check does not stop the others, except those that need what failed: they are skipped.

    Memory: the drafter twice; `KEPT_BYTES`, and what `heldout_acceptance` says. The target reads the answers at most
    three times, and the answers of the record once.

    Args:
        folder: of the drafter.
        target: what it is to draft for.
        engine: what will serve it, for checks of its own.
        responses: the `responses.jsonl` of the training; by default one in the folder or in the two above it.

    Yields:
        One diagnosis a check that applies, when it is done.

    Raises:
        ValueError: responses that cannot be read.
    """
    folder = Path(folder)
    # Beside the drafter, where it was published, or above it, as `dpace train` and `dpace compare` leave them.
    for place in (folder, *folder.resolve().parents[:2]):
        if not responses and (place / "responses.jsonl").is_file():
            responses = place / "responses.jsonl"
    answers = read_responses(responses, len(target.head.weight)) if responses else []
    spec, diagnoses = check_files(folder, target)
    if spec and engine:
        reader = engine_of(engine)
        message = reader.fault(spec) or reader.target_fault(target.model.config.model_type)
        found, _, fix = message.partition("; ")
        diagnoses.append(Diagnosis(f"engine: {engine}", "fails" if message else "passes", found, "", fix))
    yield from diagnoses
    trial = Trial(target, folder, spec, answers) if spec else None
    for name, check in RUN.items():
        failed = [done.check for done in diagnoses if done.result == "fails" and done.check in NEEDED]
        if failed or trial is None:
            diagnosis = Diagnosis(name, "skipped", f"fix first: {', '.join(failed)}")
        elif name in MEASURED and not answers:
            diagnosis = Diagnosis(name, "skipped", "no responses to measure on; name a file with --responses")
        else:
            outcome, diagnosis = attempt(name, check, trial)
            if outcome:
                diagnosis = Diagnosis(name, *outcome)
        diagnoses.append(diagnosis)
        yield diagnosis
