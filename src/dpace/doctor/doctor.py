"""Examine a drafter's folder by named checks of what would go wrong when it is served.

What comes in is a folder and its target; what goes out is a `Diagnosis` for each check. First come those of the files
(`dpace.doctor.checks`). Then the drafter is run: it decodes three prompts, and its tau is measured as the config says
and as other values would have it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.config import Recipe
from dpace.decode import generate, generate_plain
from dpace.doctor.checks import CONFIG, WEIGHTS, Diagnosis, attempt, check_engine, check_files
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.spec import DrafterSpec, are_servable
from dpace.engines import EngineName
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance, tau_gain
from dpace.recipes.recipe_file import read_recipe
from dpace.respond.responses import Response, read_responses
from dpace.system.device import dtype_name
from dpace.system.progress import count, track
from dpace.target import Target
from dpace.target.chat import encode_chat

PROMPTS = (
    "Count from one to twenty, in words.",
    "Write a Python function that reverses a list.",
    "Explain in two sentences why the sky is blue.",
)
MAX_NEW_TOKENS = 32
"""Tokens that each of them is answered with."""
MAX_ANSWERS = 24
"""Answers that two ways of reading a drafter are compared on."""
MIN_TAU = 1.1
"""Lowest useful mean acceptance length, in tokens per verification; decoding without a drafter gives 1."""
LEAST_GAIN = {"sample_from_anchor": 0.2, "is_causal": 0.02, "target_layer_ids": 0.02}
"""Least gain of tau by which another way of reading a drafter is taken to be the one that it was trained in.
Shifted slots cost a trained drafter most of its tau. A drafter that has learned little gains a little by a shift."""
MAX_TAU_CHANGE = 0.01
"""Largest relative change of tau on the same responses in fp32, where only rounding differs."""
Finding = tuple[Any, ...]
"""Result, what was found, and where it is wrong what was expected and what to do; see `Diagnosis`."""


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
        recipe, _ = attempt("recipe", lambda: read_recipe(self.folder / "recipe.yaml"))
        return recipe

    @cached_property
    def acceptance(self) -> Acceptance:
        """Accepted lengths on the first responses, as the config says."""
        return self.measure(self.responses[:MAX_ANSWERS])

    def measure(self, responses: list[Response], **changes: Any) -> Acceptance:
        """Measure accepted lengths where the config's values are these; the drafter stays as it was.

        The responses are cut as in training.
        """
        longest = self.recipe.train.max_length if self.recipe else 10**9
        answers = ResponseDataset(responses, max_length=longest, num_anchors=None, seed=0)
        read_as(self.drafter, replace(self.spec, **changes))
        try:
            return heldout_acceptance(self.drafter, self.target, answers)
        finally:
            read_as(self.drafter, self.spec)


def read_as(drafter: Drafter, spec: DrafterSpec) -> None:
    """Let a drafter have the slots, the causality and the layers of another spec."""
    drafter.config.dflash_config["sample_from_anchor"] = spec.sample_from_anchor
    drafter.config.target_layer_ids = list(spec.target_layer_ids)
    for layer in drafter.layers:
        part: Any = layer.self_attn
        part.is_causal = part.kind == "sliding_attention" if spec.is_causal == "sliding" else spec.is_causal


def decode_prompts(trial: Trial) -> Finding:
    """Compare the texts of decoding with and without the drafter."""
    target = trial.target
    done = []
    num_same = 0
    for prompt in PROMPTS:
        token_ids = encode_chat(target, [{"role": "user", "content": prompt}])
        plain = generate_plain(target, token_ids, max_new_tokens=MAX_NEW_TOKENS)
        drafted = generate(target, trial.drafter, token_ids, width="full", max_new_tokens=MAX_NEW_TOKENS)
        num_same += drafted.token_ids == plain.token_ids
        done.append(drafted.acceptance)
    found = f"tau {Acceptance.of_prompts(done).tau:.2f}, {num_same} of {len(done)} texts as without the drafter"
    if num_same == len(done):
        return "passes", found
    if target.model.dtype != torch.float32:
        return "skipped", f"{found}; in {dtype_name(target.model.dtype)} a near tie may change one"
    return "fails", found, "the same texts", "run `dpace check`, and report what it prints"


def accept_drafts(trial: Trial) -> Finding:
    """Compare tau with what training recorded, and with the lowest useful one.

    On the recorded responses in fp32, where nothing is left to chance, it may differ by `MAX_TAU_CHANGE`. Elsewhere it
    has to reach the recorded interval.
    """
    record = trial.spec.record
    ids = record.get("tau_responses", [])
    recorded = [response for response in trial.responses if response.id in ids]
    tau = (trial.measure(recorded) if recorded else trial.acceptance).tau
    found = f"tau {tau:.3f}{' on the responses of the training' if recorded else ''}"
    low, high = record.get("tau_interval", [None])[0], math.inf
    is_exact = record.get("dtype") == dtype_name(trial.target.model.dtype) == "float32"
    if is_exact and trial.recipe and len(recorded) == len(ids) > 0:
        low, high = record["tau"] * (1 - MAX_TAU_CHANGE), record["tau"] * (1 + MAX_TAU_CHANGE)
    if low is not None and not low <= tau <= high:
        fix = "name the target of the training, or copy the drafter again: one of them is another one"
        return "fails", found, f"{low:.3f} to {high:.3f}", fix
    if tau < MIN_TAU:
        return "warns", found, f"{MIN_TAU} or more", "train longer, or for this target"
    return "passes", found


def compare_ways(trial: Trial, *, key: str) -> Finding:
    """Measure tau on the same answers as if the config had another value, and fail where that is better.

    The interval of the paired gain over answers has to lie above `LEAST_GAIN`, and drafts have to be accepted at all.
    A config with which tau is what training recorded is right: a drafter that has learned little may gain by others.
    """
    answers = trial.responses[:MAX_ANSWERS]
    ways = [(trial.measure(answers, **{key: value}), value) for value in other_values(trial.spec, key)]
    if not ways:
        return "skipped", "this drafter can be read in one way only"
    best, value = max(ways, key=lambda way: way[0].tau)
    said = json.dumps(value)
    found = f"tau {trial.acceptance.tau:.2f} as the config says, {best.tau:.2f} with {said}"
    _, low, high = tau_gain([best], [trial.acceptance])
    if max(best.tau, trial.acceptance.tau) < MIN_TAU or not (low > LEAST_GAIN[key] or high < 0):
        return "skipped", f"{found}: cannot be told apart on {count(len(answers), 'answer')}"
    if high < 0 or "tau" in trial.spec.record and accept_drafts(trial)[0] == "passes":
        return "passes", found
    return "fails", found, said, f'write "{key}": {said} into config.json, also where dflash_config has it'


def other_values(spec: DrafterSpec, key: str) -> list[Any]:
    """Return the values of a key that a drafter may have been trained with instead."""
    if key == "target_layer_ids":
        moved = [tuple(layer + step for layer in spec.target_layer_ids) for step in (1, -1)]
        return [ids for ids in moved if are_servable(ids, spec.num_target_layers)]
    if key == "sample_from_anchor" and spec.selector:
        return []  # a head has no vector for the slot that blocks would have more
    return [not getattr(spec, key)]


MEASURED: dict[str, Callable[[Trial], Finding]] = {
    "accepted length": accept_drafts,
    **{f"measured {key}": partial(compare_ways, key=key) for key in LEAST_GAIN},
}
"""Checks that need answers of the target."""
RUN: dict[str, Callable[[Trial], Finding]] = {
    "loads": lambda trial: ("passes", f"{trial.drafter.num_parameters():,} parameters"),
    "decodes three prompts": decode_prompts,
    **MEASURED,
}
"""Checks that run the drafter, in this order."""
NEEDED = {CONFIG, WEIGHTS, "loads"}
"""Checks without which nothing is run: the drafter might not fit into memory."""


def diagnose(
    folder: str | Path, target: Target, *, engine: EngineName | None = None, responses: str | Path | None = None
) -> list[Diagnosis]:
    """Examine a drafter's folder: first the files on disk, then the drafter as it runs.

    One failed check does not stop the others, except those that need what failed: they are skipped.

    Memory: the drafter twice; what `heldout_acceptance` says.

    Args:
        folder: of the drafter.
        target: what it is to draft for.
        engine: what will serve it, for checks of its own.
        responses: the `responses.jsonl` of the training; by default one in the folder or in the two above it.

    Returns:
        One diagnosis a check that applies.

    Raises:
        ValueError: responses that cannot be read.
    """
    folder = Path(folder)
    places = [place / "responses.jsonl" for place in (folder, *folder.resolve().parents[:2])]
    responses = responses or next((place for place in places if place.is_file()), None)
    recorded = read_responses(responses, len(target.head.weight)) if responses else []
    spec, diagnoses = check_files(folder, target)
    if spec and engine:
        diagnoses.append(check_engine(spec, engine))
    trial = spec and Trial(target, folder, spec, recorded)
    for name, check in track(list(RUN.items()), "examining"):
        failed = [d.check for d in diagnoses if d.result == "fails" and d.check in NEEDED]
        if failed or trial is None:
            found = Diagnosis(name, "skipped", f"fix first: {', '.join(failed)}")
        elif name in MEASURED and not recorded:
            found = Diagnosis(name, "skipped", "no responses to measure on; name a file with --responses")
        else:
            finding, failure = attempt(name, partial(check, trial))
            found = Diagnosis(name, *finding) if finding else failure
        diagnoses.append(found)
    return diagnoses
