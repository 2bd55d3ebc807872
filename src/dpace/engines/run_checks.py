"""Checks that run the drafter: leaks, parity and accepted lengths."""

import torch

from dpace.data.chat import encode_chat
from dpace.data.responses import Response
from dpace.engines.subject import Check, Observation, Probe, Subject
from dpace.measure.parity import check_views

MIN_TAU = 1.1
"""Tokens a verification; decoding without a drafter gives 1."""
MAX_TAU_CHANGE = 0.01
"""Of tau on the same responses in fp32, where only rounding differs."""
FIX_REPORT = "report this: the code is wrong, not the folder"


def _view(number: int) -> Probe:
    """One of the findings of `check_views`, on two responses, or on a prompt where there are none."""

    def look(subject: Subject) -> Observation:
        if subject.target.model.dtype != torch.float32:
            return Observation(None, "needs the target in fp32")
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
    if subject.acceptance is None:
        return Observation(None, "no responses; name a file with --responses")
    return Observation(subject.acceptance.tau >= MIN_TAU, f"tau {subject.acceptance.tau:.2f}", f"{MIN_TAU} or more")


def _accepted_length(subject: Subject) -> Observation:
    """Against the interval of the training; more strictly on the very same responses in fp32, which leave no room for chance."""
    if subject.acceptance is None or "tau" not in subject.record:
        return Observation(None, "no responses" if subject.acceptance is None else "not recorded by the training")
    before, (low, high) = subject.record["tau"], subject.record["tau_interval"]
    dtypes = {subject.record["dtype"], subject.facts["dtype"], *(str(t.dtype)[6:] for t in subject.tensors.values())}
    ids = set(subject.record["tau_responses"])
    is_same = ids <= {r.id for r in subject.responses} and "train" in subject.recipe and dtypes == {"float32"}
    if is_same:
        low, high = before * (1 - MAX_TAU_CHANGE), before * (1 + MAX_TAU_CHANGE)
    tau = subject.acceptance.tau
    found = f"tau {tau:.3f} on {len(subject.acceptance.rows)} responses{', those of the training' if is_same else ''}"
    return Observation(
        low <= tau <= high or tau > before and not is_same, found, f"{before:.3f} [{low:.3f}, {high:.3f}]"
    )


RUN_CHECKS = (
    Check(
        "loads",
        "fails",
        lambda subject: Observation(bool(subject.drafter), "yes", "yes"),
        "mend what the message names",
    ),
    Check("no leak from the future", "fails", _view(0), FIX_REPORT),
    Check("training view is serving view", "fails", _view(1), FIX_REPORT),
    Check("drafts anything", "warns", _accepts, "train longer, or for this target"),
    Check(
        "accepted length", "fails", _accepted_length, "not the weights or the target of the training: copy them again"
    ),
)
