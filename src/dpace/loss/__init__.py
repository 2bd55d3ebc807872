"""What training minimizes: the frozen-head loss, its scores by tile, and the objectives."""

from dpace.loss.loss import (
    Slots,
    SlotScores,
    Weigh,
    block_loss,
    candidate_logits,
    frozen_head_nll,
)
