"""Examine a drafter's folder by named checks of what would go wrong when it is served.

What comes in is a folder and its target; what goes out is a `Diagnosis` for each check: first those of the files
(`dpace.doctor.checks`), then, where the drafter loads, those that run it: leaks, parity and accepted lengths.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dpace.config import Engine
from dpace.doctor.checks import CONFIG_CHECKS, FILE_CHECKS, TENSOR_KEYS, WEIGHT_CHECKS, Check, Observation
from dpace.doctor.examined import ExaminedFolder
from dpace.engines.folder import read_files
from dpace.measure.parity import check_views
from dpace.metrics import tau_gain
from dpace.respond.responses import Response, read_responses
from dpace.system.loading import first_names
from dpace.system.progress import one_line, printable, progress_bar
from dpace.target import Target
from dpace.target.chat import encode_chat

MIN_TAU = 1.1
"""Lowest useful mean acceptance length, in tokens per verification; decoding without a drafter gives 1."""
MIN_SHIFT_GAIN = 0.25
"""Least relative gain of tau from which on drafts count as read from the wrong slots; chosen, not measured."""
MAX_TAU_CHANGE = 0.01
"""Largest relative change of tau on the same responses in fp32, where only rounding differs."""
EXACT_DTYPES = {"float32", "bfloat16"}
"""Dtypes of weights as training writes them."""
REPORT = "report this to dpace: its code is wrong, not the folder"


def compare_views(folder: ExaminedFolder, number: str) -> Observation:
    """Return one finding of `check_views`, on two responses, or on a prompt where there are none."""
    if folder.target.model.dtype != torch.float32:
        return Observation(None, "the target is not in fp32, which this check needs")
    responses = folder.responses[:2]
    if not responses:
        token_ids = encode_chat(folder.target, [{"role": "user", "content": "Count from one to twenty, in words."}])
        responses = [Response("prompt", "doctor", [], token_ids, [[len(token_ids) // 2, len(token_ids)]])]
    finding = check_views(folder.target, folder.drafter, responses)[int(number)]
    return Observation(finding.is_passed, finding.detail, "equal up to rounding")


def accepts_drafts(folder: ExaminedFolder) -> Observation:
    """Measure whether any draft is accepted."""
    if folder.acceptance is None:
        return Observation(None, "no responses to measure on; name a file with --responses")
    return Observation(folder.acceptance.tau >= MIN_TAU, f"tau {folder.acceptance.tau:.2f}", f"{MIN_TAU} or more")


def first_slot(folder: ExaminedFolder) -> Observation | None:
    """Compare tau with that of drafts read one slot before or behind, which has to be clearly higher to count.

    Both are near 1 for a drafter that was hardly trained, and either may be the higher one: its gain counts from
    `MIN_SHIFT_GAIN` on, and where its interval is above 0. A head has no vector for the slot that blocks would have
    more.
    """
    if folder.drafter.spec.head:
        return None
    acceptance, shifted = folder.acceptance, folder.shifted_acceptance
    if acceptance is None or shifted is None:
        return Observation(None, "no responses to measure on")
    gain, low, _ = tau_gain([shifted], [acceptance])
    is_right = shifted.tau < MIN_TAU or gain < MIN_SHIFT_GAIN or not low > 0  # of few responses, low is nan
    found = f"tau {acceptance.tau:.2f}, and {shifted.tau:.2f} when read with the other value"
    return Observation(is_right, found, f"{bool(1 - folder.drafter.first_slot)}, with the higher tau")


def accepted_length(folder: ExaminedFolder) -> Observation:
    """Compare tau with the interval that training recorded.

    On the very same responses with the target in fp32, where nothing is left to chance, the range is `MAX_TAU_CHANGE`
    around the recorded tau, which is that of the weights in the file.
    """
    record, acceptance = folder.record, folder.acceptance
    if acceptance is None:
        return Observation(None, "no responses to measure on")
    if "tau" not in record:
        return Observation(None, "training did not record it")
    before, (low, high) = record["tau"], record["tau_interval"]
    is_exact = {record["dtype"], folder.facts["dtype"]} == {"float32"} and not {*folder.stored_dtypes} - EXACT_DTYPES
    is_same = is_exact and "train" in folder.recipe and {*record["tau_responses"]} <= {r.id for r in folder.responses}
    if is_same:
        low, high = before * (1 - MAX_TAU_CHANGE), before * (1 + MAX_TAU_CHANGE)
    elif None in (low, high):
        return Observation(None, "training had too few responses for an interval")
    tau = acceptance.tau
    observed = f"tau {tau:.3f} on {len(acceptance.rows)} responses{', those of the training' if is_same else ''}"
    is_right = low <= tau <= high or tau > before and not is_same
    return Observation(is_right, observed, f"{before:.3f} [{low:.3f}, {high:.3f}]")


RUN_CHECKS = (
    Check(
        "loads",
        "fails",
        lambda folder: Observation(bool(folder.drafter), "yes", "yes"),
        "fix what the message names",
        "anything that the checks above did not see",
    ),
    Check("no leak from the future", "fails", compare_views, REPORT, "tau in training is too good to be true", ("0",)),
    Check(
        "training view is serving view",
        "fails",
        compare_views,
        REPORT,
        "tau in training is not tau when decoding",
        ("1",),
    ),
    Check(
        "drafts anything",
        "warns",
        accepts_drafts,
        "train longer, or train a drafter for this target",
        "tau is below 1.1 on responses: drafting costs more than it gives",
    ),
    Check(
        "sample_from_anchor",
        "fails",
        first_slot,
        "write the other value of sample_from_anchor into dflash_config: drafts are read one slot too late or too soon",
        "slot 0 predicts the first draft token in some drafters that do not say so (DeepSpec); nothing is accepted",
    ),
    Check(
        "accepted length",
        "fails",
        accepted_length,
        "copy the drafter again and name the right target: these are not the weights or the target of the training",
        "tau is not what training recorded: other weights or target, or layers or columns reordered",
    ),
)
"""Checks that run the drafter; the others need it to load."""
MAX_SHOWN = 300
"""Characters of a value that the table shows."""
UNSAFE = (*(check.name for check in (*FILE_CHECKS, *WEIGHT_CHECKS)), *TENSOR_KEYS, "hidden_size")
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
    recorded = _find_responses(Path(folder), target, responses)
    examined = ExaminedFolder(**vars(read_files(folder)), target=target, engine=engine, responses=recorded)
    static = [*FILE_CHECKS]
    static += CONFIG_CHECKS if "config.json" not in examined.problems else ()
    static += WEIGHT_CHECKS if "model.safetensors" not in examined.problems else ()
    diagnoses: list[Diagnosis] = []
    with progress_bar() as bar:
        task = bar.add_task("examining", total=len(static) + len(RUN_CHECKS), info="")

        def run(checks: Sequence[Check]) -> None:
            for check in checks:
                bar.update(task, info=check.name)
                diagnoses.extend(_run_check(check, examined))
                bar.update(task, advance=1)

        run(static)
        failed = [diagnosis.check for diagnosis in diagnoses if diagnosis.result == "fails"]
        damaged = [name for name in UNSAFE if name in failed]
        if damaged:
            reason = f"not tried, since these checks fail: {first_names(damaged)}"
            return [*diagnoses, Diagnosis(RUN_CHECKS[0].name, "skipped", reason, "", "")]
        run(RUN_CHECKS[:1])
        if diagnoses[-1].result == "passes":
            run(RUN_CHECKS[1:])
        elif failed:
            reason = "refused; fix the failures above first"
            diagnoses[-1] = diagnoses[-1]._replace(result="skipped", found=reason, expected="", fix="")
    return diagnoses


def _find_responses(folder: Path, target: Target, named: str | Path | None) -> list[Response]:
    """Read the responses that were named, or those of the training, without changing their file."""
    num_tokens = len(target.head.weight)
    if named:
        return read_responses(named, num_tokens)
    places = [folder, *folder.resolve().parents[:2]]
    path = next((place / "responses.jsonl" for place in places if (place / "responses.jsonl").is_file()), None)
    try:
        return read_responses(path, num_tokens) if path else []
    except ValueError as error:
        print(f"tau is not measured: {printable(str(error))}", file=sys.stderr)
        return []


def _run_check(check: Check, folder: ExaminedFolder) -> list[Diagnosis]:
    """Run one check; a value that cannot even be compared is a failure of that check."""
    try:
        observation = check.probe(folder, *check.keys)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        observation = Observation(False, str(error) or type(error).__name__)
        check = check._replace(severity="fails")
    if observation is None:
        return []
    result = "skipped" if observation.is_right is None else "passes" if observation.is_right else check.severity
    fix = check.fix if observation.is_right is False else ""
    return [Diagnosis(check.name, result, _short(observation.found), _short(observation.expected), fix)]


def _short(value: object) -> str:
    """Return a value as one line of the table; a config may hold any text."""
    text = one_line(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
