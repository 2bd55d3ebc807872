"""Examine a drafter's folder by named checks of what would go wrong when it is served."""

import sys
from pathlib import Path
from typing import Literal, NamedTuple

from dpace.config import Engine
from dpace.data.responses import Response
from dpace.engines.config_checks import CONFIG_CHECKS, FILE_CHECKS, SIZES
from dpace.engines.folder import read_files
from dpace.engines.recorded import read_recorded
from dpace.engines.run_checks import RUN_CHECKS
from dpace.engines.subject import Check, Subject, some
from dpace.engines.weight_checks import WEIGHT_CHECKS
from dpace.progress import printable, progress_bar
from dpace.target import Target

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
