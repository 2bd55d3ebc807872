"""Fit the temperature of a drafter's confidence on responses that it was not trained on."""

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
