"""Fit the temperature of a drafter's confidence, and measure how well it says how often it is right."""

from typing import Any

import torch
from torch import Tensor

from dpace.batches.dataset import ResponseDataset
from dpace.drafter import Drafter
from dpace.measure.heldout import score_conversation
from dpace.target import Target

TEMPERATURES = [2 ** (i / 4) for i in range(-6, 11)]
MAX_CALIBRATION_ROWS = 1500
"""Number of slots that the temperature is fitted to."""


@torch.no_grad()
def fit_confidence_temperature(
    drafter: Drafter, target: Target, dataset: ResponseDataset, token_ids: Tensor | None = None
) -> float:
    """Find the temperature at which the drafter's confidence best says whether a slot is accepted.

    The slots are those that decoding reaches: all slots before them are right. At most `MAX_CALIBRATION_ROWS` are used.
    What is minimized, over a grid of quarter octaves, is the cross-entropy between the probability of the drafter's
    most likely token and whether it is the text's token.

    Args:
        drafter: a trained drafter.
        target: its target.
        dataset: responses that were not trained on, every token an anchor.
        token_ids: the only tokens that are drafted; by default all.

    Returns:
        The temperature, above 1 for a drafter that is too sure; 1 without a response.
    """
    was_training = drafter.training
    drafter.eval()
    head = target.head if token_ids is None else target.head.part(token_ids)[0]
    logits, matches, count = [], [], 0
    for i in range(len(dataset)):
        reached = []
        for hidden, blocks, is_accepted in score_conversation(drafter, target, dataset, i, token_ids):
            slots = torch.arange(drafter.block_size, device=target.device)
            is_reached = blocks.is_scored & (slots <= is_accepted.sum(-1, keepdim=True) + 1)
            reached.append((hidden[is_reached], is_accepted[is_reached]))
        rows, is_right = (torch.cat(parts) for parts in zip(*reached, strict=True))
        share = max(1, round(len(rows) * len(dataset) / MAX_CALIBRATION_ROWS))
        scaled = head.logits(rows[::share]).float()
        logits.append(torch.stack([(scaled / t).amax(-1) - (scaled / t).logsumexp(-1) for t in TEMPERATURES]))
        matches.append(is_right[::share])
        count += len(matches[-1])
    drafter.train(was_training)
    if not count:
        return 1.0
    log_confidence, is_match = torch.cat(logits, dim=1).clamp_max(-1e-6), torch.cat(matches)
    errors = -torch.where(is_match, log_confidence, torch.log(-torch.expm1(log_confidence))).mean(-1)
    return TEMPERATURES[int(errors.argmin())]


def brier_score(probs: Tensor, is_true: Tensor) -> float:
    """Compute the mean squared error of probabilities: 0 is best, always saying 0.5 gives 0.25."""
    return float((probs.double() - is_true.double()).square().mean())


@torch.no_grad()
def measure_reliability(drafter: Drafter, target: Target, dataset: ResponseDataset) -> list[dict[str, Any]]:
    """Compare, slot by slot, how often blocks are accepted through it with what the drafter expects.

    The `softmax` expects the product of its calibrated confidences through the slot; the `validity` head says it
    directly. At most `MAX_CALIBRATION_ROWS` slots are used, those of whole blocks.

    Args:
        drafter: a trained drafter; without a validity head there is nothing to compare.
        target: its target.
        dataset: responses that were not trained on, every token an anchor.

    Returns:
        For each slot: `slot`, `blocks`, the share that is `accepted`, and of both the mean and the Brier score.
    """
    head = drafter.validity
    if head is None:
        return []
    was_training = drafter.training
    drafter.eval()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    per_row = max(1, MAX_CALIBRATION_ROWS // max(1, len(dataset)) // (drafter.block_size - 1))
    for i in range(len(dataset)):
        parts = []
        for hidden, blocks, is_accepted in score_conversation(drafter, target, dataset, i):
            whole = blocks.is_scored[0, :, 1:].all(-1)
            parts.append((hidden[0, whole, 1:], is_accepted[0, whole, 1:].cpu()))
        rows, is_accepted = (torch.cat(values) for values in zip(*parts, strict=True))
        chosen = slice(None, None, max(1, len(rows) // per_row))
        rows, is_accepted = rows[chosen], is_accepted[chosen]
        softmax = [drafter.confidences(target.head.logits(block)) for block in rows]
        expected = torch.tensor(softmax, dtype=torch.float64).view(len(rows), -1).cumprod(-1)
        found.append((is_accepted, expected, head(rows).sigmoid().cpu()))
    drafter.train(was_training)
    if not sum(len(accepted) for accepted, _, _ in found):
        return []
    accepted, softmax, validity = (torch.cat(parts) for parts in zip(*found, strict=True))
    table = []
    for k in range(drafter.block_size - 1):
        share = float(accepted[:, k].double().mean())
        row: dict[str, Any] = {"slot": k + 1, "blocks": len(accepted), "accepted": share}
        for name, probs in (("softmax", softmax), ("validity", validity)):
            row |= {name: float(probs[:, k].mean()), f"{name}_brier": brier_score(probs[:, k], accepted[:, k])}
        table.append(row)
    return table
