"""Examine a drafter's folder by named checks of what would go wrong when it is served.

The checks that run the drafter: leaks, parity and accepted lengths.
"""

import math
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dpace.config import Engine
from dpace.doctor.config_checks import CONFIG_CHECKS, FILE_CHECKS, SIZES, WEIGHT_CHECKS
from dpace.doctor.subject import Check, Observation, Probe, Subject, some
from dpace.engines.folder import read_files
from dpace.measure.parity import check_views
from dpace.respond.answers import read_recorded
from dpace.respond.responses import Response
from dpace.system.progress import printable, progress_bar
from dpace.target import Target
from dpace.target.chat import encode_chat

MIN_TAU = 1.1
"""Lowest useful mean acceptance length, in tokens per verification; decoding without a drafter gives 1."""
MAX_TAU_CHANGE = 0.01
"""Largest relative change of tau on the same responses in fp32, where only rounding differs."""
FIX_REPORT = "report this to dpace: its code is wrong, not the folder"


def _view(number: int) -> Probe:
    """Look at one finding of `check_views`, on two responses, or on a prompt where there are none."""

    def look(subject: Subject) -> Observation:
        if subject.target.model.dtype != torch.float32:
            return Observation(None, "the target is not in fp32, which this check needs")
        responses = subject.responses[:2]
        if not responses:
            token_ids = encode_chat(
                subject.target, [{"role": "user", "content": "Count from one to twenty, in words."}]
            )
            responses = [Response("prompt", "doctor", [], token_ids, [[len(token_ids) // 2, len(token_ids)]])]
        finding = check_views(subject.target, subject.drafter, responses)[number]
        return Observation(finding.is_passed, finding.detail, "equal up to rounding")

    return look


def _accepts(subject: Subject) -> Observation:
    """Measure whether any draft is accepted."""
    if subject.acceptance is None:
        return Observation(None, "no responses to measure on; name a file with --responses")
    return Observation(subject.acceptance.tau >= MIN_TAU, f"tau {subject.acceptance.tau:.2f}", f"{MIN_TAU} or more")


def _accepted_length(subject: Subject) -> Observation:
    """Compare tau with the interval that training recorded.

    On the very same responses with the target in fp32, where nothing is left to chance, the range is `MAX_TAU_CHANGE`
    around the recorded tau, which is that of the weights in the file.
    """
    if subject.acceptance is None or "tau" not in subject.record:
        return Observation(
            None, "no responses to measure on" if subject.acceptance is None else "training did not record it"
        )
    before, (low, high) = subject.record["tau"], subject.record["tau_interval"]
    stored = {str(t.dtype).removeprefix("torch.") for t in subject.tensors.values()}
    is_exact = {subject.record["dtype"], subject.facts["dtype"]} == {"float32"} and stored <= {"float32", "bfloat16"}
    ids = set(subject.record["tau_responses"])
    has_interval = all(type(end) in (int, float) and math.isfinite(end) for end in (low, high))
    is_same = ids <= {r.id for r in subject.responses} and "train" in subject.recipe and is_exact
    if is_same:
        low, high = before * (1 - MAX_TAU_CHANGE), before * (1 + MAX_TAU_CHANGE)
    elif not has_interval:
        return Observation(None, "training had too few responses for an interval")
    tau = subject.acceptance.tau
    observed = (
        f"tau {tau:.3f} on {len(subject.acceptance.rows)} responses{', those of the training' if is_same else ''}"
    )
    is_right = low <= tau <= high or tau > before and not is_same
    return Observation(is_right, observed, f"{before:.3f} [{low:.3f}, {high:.3f}]")


RUN_CHECKS = (
    Check(
        "loads",
        "fails",
        lambda subject: Observation(bool(subject.drafter), "yes", "yes"),
        "fix what the message names",
    ),
    Check("no leak from the future", "fails", _view(0), FIX_REPORT),
    Check("training view is serving view", "fails", _view(1), FIX_REPORT),
    Check("drafts anything", "warns", _accepts, "train longer, or train a drafter for this target"),
    Check(
        "accepted length",
        "fails",
        _accepted_length,
        "copy the drafter again and name the right target: these are not the weights or the target of the training",
    ),
)


MAX_SHOWN = 300
"""Characters of a value that the table shows."""
UNSAFE = (*(check.name for check in (*FILE_CHECKS, *WEIGHT_CHECKS)), *SIZES)
"""Checks without which a drafter is not loaded: it might not fit into memory."""


class Diagnosis(NamedTuple):
    """The result of one check."""

    check: str
    result: Literal["passes", "warns", "fails", "skipped"]
    """`fails`: engines refuse the folder or draft badly. `warns`: only some do, or it may be intended.

    `skipped`: it cannot be decided."""
    found: str
    expected: str
    fix: str
    """What to do, in one line; empty where there is nothing to do."""


def diagnose(
    folder: str | Path, target: Target, *, engine: Engine | None = None, responses: str | Path | None = None
) -> list[Diagnosis]:
    """Examine a drafter's folder: first the files on disk, then the drafter as it runs.

    One failed check does not stop the others. Files that cannot be read are not examined further; weights that are
    damaged, or that fail to load after another failure, are not run.

    Memory: the drafter as stored and as loaded; what `heldout_acceptance` says.

    Args:
        folder: of the drafter.
        target: what it is to draft for; in fp32 for the checks of leaks and views.
        engine: what will serve it, for a check of its own.
        responses: the `responses.jsonl` of the training; by default one in the folder or in the two above it.

    Returns:
        One diagnosis a check that applies.

    Raises:
        ValueError: responses that were named and cannot be read.
    """
    found = _responses(Path(folder), target, responses)
    subject = Subject(**vars(read_files(folder)), target=target, engine=engine, responses=found)
    static = [*FILE_CHECKS]
    static += CONFIG_CHECKS if "config.json" not in subject.problems else ()
    static += WEIGHT_CHECKS if "model.safetensors" not in subject.problems else ()
    with progress_bar() as bar:
        task = bar.add_task("examining", total=len(static) + len(RUN_CHECKS), info="")

        def run(check: Check) -> list[Diagnosis]:
            bar.update(task, info=check.name)
            diagnosis = _run(check, subject)
            bar.advance(task)
            return [diagnosis] if diagnosis else []

        diagnoses = [diagnosis for check in static for diagnosis in run(check)]
        failed = [diagnosis.check for diagnosis in diagnoses if diagnosis.result == "fails"]
        damaged = [name for name in UNSAFE if name in failed]
        if damaged:
            reason = f"not tried, since these checks fail: {some(damaged)}"
            return [*diagnoses, Diagnosis(RUN_CHECKS[0].name, "skipped", reason, "", "")]
        (loading,) = run(RUN_CHECKS[0])
        if loading.result == "fails" and failed:
            reason = "refused; fix the failures above first"
            loading = loading._replace(result="skipped", found=reason, expected="", fix="")
        is_running = loading.result == "passes"
        return [*diagnoses, loading, *(diagnosis for check in RUN_CHECKS[1:] if is_running for diagnosis in run(check))]


def _responses(folder: Path, target: Target, named: str | Path | None) -> list[Response]:
    """Read the responses that were named, or those of the training, without changing their file."""
    num_tokens = len(target.head.weight)
    if named:
        return read_recorded(named, num_tokens)
    places = [folder, *folder.resolve().parents[:2]]
    path = next((place / "responses.jsonl" for place in places if (place / "responses.jsonl").is_file()), None)
    try:
        return read_recorded(path, num_tokens) if path else []
    except ValueError as error:
        print(f"tau is not measured: {printable(str(error))}", file=sys.stderr)
        return []


def _run(check: Check, subject: Subject) -> Diagnosis | None:
    """Run one check; a value that cannot even be compared is a failure of that check."""
    try:
        observation = check.look(subject)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        return Diagnosis(check.name, "fails", _short(error) or type(error).__name__, "", check.fix)
    if observation is None:
        return None
    is_right, found, expected = observation
    result = "skipped" if is_right is None else "passes" if is_right else check.severity
    fix = "" if result in ("passes", "skipped") else check.fix
    return Diagnosis(check.name, result, _short(found), _short(expected), fix)


def _short(value: object) -> str:
    """Show a value in one line; a config may hold any text."""
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
