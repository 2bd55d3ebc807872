"""The checks that run the drafter: leaks, parity and accepted lengths."""

import math

import torch

from dpace.data.chat import encode_chat
from dpace.data.responses import Response
from dpace.engines.subject import Check, Observation, Probe, Subject
from dpace.measure.parity import check_views

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
