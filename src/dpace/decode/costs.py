"""Time the steps of decoding on this machine."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.drafter.views import draft_block, to_predicted
from dpace.drafter.vocabulary import PackedRows
from dpace.fast.cache import TextCache
from dpace.target import Target

FILLER_TOKENS = 128
"""Number of tokens before the timed steps."""
DRAFT = 0
"""Kind of a step that drafts behind a few tokens; that of a verification is its width."""
FIRST_DRAFT = -1
"""Kind of a step that reads all features before it drafts."""
NUM_ROUNDS = 5
"""Number of times that each step is timed."""


class StepCosts(NamedTuple):
    """Seconds of the parts of a step on this machine."""

    verify_seconds: Sequence[float]
    """Seconds in which the target reads 1, 2, ... tokens."""
    draft_seconds: float
    """Seconds of the drafter with the head."""
    reading_seconds: float = 0.0
    """Additional seconds of the first draft, in which the drafter reads the prompt."""


@torch.inference_mode()
def measure_costs(target: Target, drafter: Drafter, *, temperature: float = 0.0) -> StepCosts:
    """Measure the seconds of decoding steps on this machine; takes about a second for a small model.

    Widths that are not timed are interpolated. A width counts as no slower than a wider one. Steps take turns, and the
    minimum of `NUM_ROUNDS` rounds counts, because disturbances only make steps slower; one more round warms up.

    Memory: keys and values of `FILLER_TOKENS` tokens, and their features.

    Args:
        target: timed while it reads 1 to `block_size` tokens.
        drafter: timed while it drafts a block.
        temperature: above 0, tokens are drawn, which takes longer than choosing the most likely ones.
    """
    size = drafter.block_size
    timed = [width for width in sorted({1, 2, 3, 4, 6, 8, 12, 16, size}) if width <= size]
    sampler = Sampler(temperature, seed=0, device=target.device)
    filler = torch.full((1, max(FILLER_TOKENS, size)), drafter.mask_token_id, device=target.device)
    cache = TextCache(target.config, filler.shape[1] + size)
    cache.activate_past_recording()
    _, features = target.read(filler, cache, drafter.target_layer_ids)
    rows = PackedRows(target, drafter.vocabulary)

    def step(width: int) -> None:
        """Verify a number of tokens behind the filler, or draft."""
        if width > 0:
            logits = target.logits(target.hidden(filler[:, :width], cache)[0])
            sampler.draw(sampler.scores(logits, []), 0).tolist()
            cache.crop(-width)
            return
        read = features if width == FIRST_DRAFT else features[:, :4]
        drafted = draft_block(drafter, target, filler[:, : drafter.num_slots], read)
        hidden = to_predicted(drafted.hidden, drafter.first_slot)
        draft = drafter.selector.propose(rows, hidden, lambda: drafted.context[:, -1], size)
        drafter.confidences(draft.scores[0]).tolist()  # waits for the device, as drawing does

    seconds = {kind: [] for kind in (FIRST_DRAFT, DRAFT, *timed)}
    for _ in range(NUM_ROUNDS + 1):
        for kind, rounds in seconds.items():
            start = time.perf_counter()
            step(kind)
            rounds.append(time.perf_counter() - start)
    least = {kind: min(rounds[1:]) for kind, rounds in seconds.items()}
    verify_seconds = np.interp(range(1, size + 1), timed, [least[width] for width in timed])
    verify_seconds = np.minimum.accumulate(verify_seconds[::-1])[::-1]
    return StepCosts(verify_seconds.tolist(), least[DRAFT], max(0.0, least[FIRST_DRAFT] - least[DRAFT]))
