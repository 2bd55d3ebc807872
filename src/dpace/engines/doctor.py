"""A drafter's folder and its target in; what would go wrong when it is served, as named checks, out."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dpace.config import Engine
from dpace.data.responses import Response, encode_chat, read_responses
from dpace.engines.config_checks import CONFIG, FILES, WEIGHTS, Case, Check, Look, Seen, some
from dpace.engines.folder import read_files
from dpace.measure.check import check_views
from dpace.progress import progress_bar
from dpace.target import Target

MIN_TAU = 1.1
"""Tokens a verification; decoding without a drafter gives 1."""
MAX_TAU_CHANGE = 0.01
"""Of tau on the same responses in fp32, where only rounding differs."""
OURS = "report this: the code is wrong, not the folder"


class Diagnosis(NamedTuple):
    """The result of one check."""

    check: str
    result: Literal["passes", "warns", "fails", "skipped"]
    """`fails`: engines refuse the folder or draft badly; `warns`: some do, or it may be meant; `skipped`: cannot be told."""
    found: str
    expected: str
    fix: str
    """What to do, in one line; empty where nothing is to be done."""


def _view(number: int) -> Look:
    """One of the findings of `check_views`, on two responses, or on a prompt where there are none."""

    def look(case: Case) -> Seen:
        if case.target.model.dtype != torch.float32:
            return Seen(None, "needs the target in fp32")
        responses = case.responses[:2]
        if not responses:
            token_ids = encode_chat(case.target, [{"role": "user", "content": "Count from one to twenty, in words."}])
            responses = [Response("prompt", "doctor", [], token_ids, [[len(token_ids) // 2, len(token_ids)]])]
        finding = check_views(case.target, case.drafter, responses)[number]
        return Seen(finding.is_passed, finding.detail, "equal up to rounding")

    return look


def _accepts(case: Case) -> Seen:
    if case.acceptance is None:
        return Seen(None, "no responses; name a file with --responses")
    return Seen(case.acceptance.tau >= MIN_TAU, f"tau {case.acceptance.tau:.2f}", f"{MIN_TAU} or more")


def _accepted_length(case: Case) -> Seen:
    """Against the interval of the training; more strictly on the very same responses in fp32, which leave no room for chance."""
    if case.acceptance is None or "tau" not in case.record:
        return Seen(None, "no responses" if case.acceptance is None else "not recorded by the training")
    before, (low, high) = case.record["tau"], case.record["tau_interval"]
    dtypes = {case.record["dtype"], case.facts["dtype"], *(str(t.dtype)[6:] for t in case.tensors.values())}
    ids = set(case.record["tau_responses"])
    is_same = ids <= {r.id for r in case.responses} and "train" in case.recipe and dtypes == {"float32"}
    if is_same:
        low, high = before * (1 - MAX_TAU_CHANGE), before * (1 + MAX_TAU_CHANGE)
    tau = case.acceptance.tau
    found = f"tau {tau:.3f} on {len(case.acceptance.rows)} responses{', those of the training' if is_same else ''}"
    return Seen(low <= tau <= high or tau > before and not is_same, found, f"{before:.3f} [{low:.3f}, {high:.3f}]")


RUN = (
    Check("loads", "fails", lambda case: Seen(bool(case.drafter), "yes", "yes"), "mend what the message names"),
    Check("no leak from the future", "fails", _view(0), OURS),
    Check("training view is serving view", "fails", _view(1), OURS),
    Check("drafts anything", "warns", _accepts, "train longer, or for this target"),
    Check(
        "accepted length", "fails", _accepted_length, "not the weights or the target of the training: copy them again"
    ),
)


def diagnose(
    folder: str | Path, target: Target, *, engine: Engine | None = None, responses: str | Path | None = None
) -> list[Diagnosis]:
    """Examine a drafter's folder by what is on disk, then by running it.

    One failed check does not stop the others: only what cannot be read is not looked at, and weights that are damaged, or that fail
    to load after another failure, are not run.

    Memory: the drafter as stored and as loaded; what `heldout_acceptance` says.

    Args:
        folder: of the drafter.
        target: what it is to draft for; in fp32 for the checks of leaks and views.
        engine: what will serve it, for a check of its own.
        responses: the `responses.jsonl` of the training; by default one in the folder or in the two above it.

    Returns:
        One diagnosis a check that applies.

    Raises:
        ValueError: responses that cannot be read.
    """
    places = [Path(folder), *Path(folder).resolve().parents[:2]]
    path = responses or next((p / "responses.jsonl" for p in places if (p / "responses.jsonl").exists()), None)
    case = Case(
        **vars(read_files(folder)), target=target, engine=engine, responses=read_responses(path) if path else []
    )
    static = [*FILES]
    static += CONFIG if "config.json" not in case.problems else ()
    static += WEIGHTS if "model.safetensors" not in case.problems else ()
    with progress_bar() as bar:
        task = bar.add_task("examining", total=len(static) + len(RUN), info="")

        def run(check: Check) -> list[Diagnosis]:
            bar.update(task, info=check.name)
            found = _run(check, case)
            bar.advance(task)
            return [found] if found else []

        found = [diagnosis for check in static for diagnosis in run(check)]
        failed = [diagnosis.check for diagnosis in found if diagnosis.result == "fails"]
        damaged = [check.name for check in (*FILES, *WEIGHTS) if check.name in failed]
        if damaged:
            return [*found, Diagnosis(RUN[0].name, "skipped", f"not tried with failures of {some(damaged)}", "", "")]
        (loading,) = run(RUN[0])
        if loading.result == "fails" and failed:
            loading = loading._replace(result="skipped", found="refused, after the failures above", expected="", fix="")
        is_running = loading.result == "passes"
        return [*found, loading, *(diagnosis for check in RUN[1:] if is_running for diagnosis in run(check))]


def _run(check: Check, case: Case) -> Diagnosis | None:
    """Look once; a value that cannot even be compared is a failure of that check."""
    try:
        seen = check.look(case)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        return Diagnosis(check.name, "fails", str(error) or type(error).__name__, "", check.fix)
    if seen is None:
        return None
    result = "skipped" if seen.is_right is None else "passes" if seen.is_right else check.severity
    fix = "" if result in ("passes", "skipped") else check.fix
    return Diagnosis(check.name, result, str(seen.found), str(seen.expected), fix)
