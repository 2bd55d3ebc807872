"""Confidences and step times in; how many slots are worth verifying, and whether drafting is worth it at all, out."""

import itertools
import operator
import statistics
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpace.cache import make_cache
from dpace.drafter import Drafter
from dpace.target import Target

FILLER_TOKENS = 128
"""Context that step times are measured with."""
MIN_PAUSE, MAX_PAUSE = 8, 64
"""Steps from a draft that did not pay to the next; doubled each time in a row."""
DECAY = 0.9
"""Weight of the past in the running sums, a drafted step."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of a step on this machine."""

    verify_seconds: Sequence[float]
    """Of the target reading 1, 2, ... tokens."""
    draft_seconds: float
    """Of the drafter with the head."""

    @property
    def plain_rate(self) -> float:
        """Tokens a second without drafting."""
        return 1 / self.verify_seconds[0]

    def best_width(self, reach: Sequence[float]) -> tuple[int, float]:
        """The tokens to verify that give the most expected tokens a second.

        Args:
            reach: for each draft slot, the probability that it and all before it are accepted; as many as may be verified.

        Returns:
            The width, 1 (none of the draft) to `len(reach) + 1`, and the expected tokens emitted.
        """
        best, best_rate, emitted = (1, 1.0), 1 / (self.draft_seconds + self.verify_seconds[0]), 1.0
        for width, probability in enumerate(reach, start=2):
            emitted += probability
            rate = emitted / (self.draft_seconds + self.verify_seconds[width - 1])
            if rate > best_rate:
                best, best_rate = (width, emitted), rate
        return best


class Pace:
    """Decides, step by step, whether to draft and how wide to verify, so as to emit the most tokens a second.

    The width maximizes `(1 + sum over k < width of product over i <= k of c[i]) / (draft + verify[width])` with `c` the drafter's
    calibrated confidences: the surrogate that D-PACE trains for, over the time that it takes here. Confidences that promise
    more than is accepted are scaled down by what was found so far in this response. Where drafting has emitted less than plain
    decoding would have in the same time, it pauses, longer each time, and then tries a single token, so that a bad drafter costs
    little.

    Args:
        costs: of this machine.
        previous: the pace of the drafter's last response; if drafting did not pay at its end, a single token is tried first.
    """

    def __init__(self, costs: StepCosts, previous: "Pace | None" = None):
        self.costs = costs
        self.pause, self.next_pause = 0, min(previous.next_pause, 2 * MIN_PAUSE) if previous else MIN_PAUSE
        self._forget()

    def _forget(self) -> None:
        """Trust the drafter until it is found wanting."""
        self.promised = self.kept = self.emitted = 1.0
        self.seconds = 1.0 / self.costs.plain_rate

    def wants_draft(self) -> bool:
        """Whether this step should draft; called once a step."""
        self.pause = max(0, self.pause - 1)
        return self.pause == 0

    def width(self, confidences: Sequence[float]) -> int:
        """Tokens to verify after a draft with these confidences, the last token included."""
        trust = min(1.0, self.kept / self.promised)
        self._reach = list(itertools.accumulate(confidences, operator.mul))
        width, _ = self.costs.best_width([trust * reach for reach in self._reach])
        return max(width, 2 if self.is_trial else 1)

    @property
    def is_trial(self) -> bool:
        """Drafting had been given up, and is tried again, with one slot."""
        return self.next_pause > MIN_PAUSE

    def record(self, width: int, accepted: int) -> None:
        """Learn from a step that drafted, also where nothing of the draft was verified (width 1)."""
        if self.is_trial and accepted == width - 1:
            self._forget()
            self.next_pause = max(MIN_PAUSE, self.next_pause // 2)
        self.promised = DECAY * self.promised + sum(self._reach[: width - 1])
        self.kept = DECAY * self.kept + accepted
        self.emitted = DECAY * self.emitted + accepted + 1
        self.seconds = DECAY * self.seconds + self.costs.draft_seconds + self.costs.verify_seconds[width - 1]
        if self.emitted / self.seconds < self.costs.plain_rate:
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, MAX_PAUSE)
        elif not self.is_trial:
            self.next_pause = MIN_PAUSE


_paces: weakref.WeakKeyDictionary[Drafter, Pace] = weakref.WeakKeyDictionary()


def make_pace(target: Target, drafter: Drafter) -> Pace:
    """A response's pace, which knows how the drafter's last one ended; measures the machine first, see `measure_costs`."""
    _paces[drafter] = Pace(measure_costs(target, drafter), _paces.get(drafter))
    return _paces[drafter]


_costs: weakref.WeakKeyDictionary[Drafter, dict[int, tuple[int, StepCosts]]] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def measure_costs(target: Target, drafter: Drafter, batch: int = 1, *, num_rounds: int = 5) -> StepCosts:
    """Measure what steps take on this machine, once for each drafter and batch size in a process; about a second for one row.

    All widths are run in turn, round by round, and the median of each is kept; widths between the measured ones are interpolated.

    Args:
        target: reads 1 to `block_size` tokens a row.
        drafter: drafts a block a row.
        batch: rows.
        num_rounds: after one that is not counted; measured again where there were fewer.
    """
    known = _costs.setdefault(drafter, {})
    if batch in known and known[batch][0] >= num_rounds:
        return known[batch][1]
    device, size = target.device, drafter.block_size
    filler = torch.full((batch, FILLER_TOKENS), drafter.mask_token_id, device=device)
    cache = make_cache(target.config, FILLER_TOKENS + size)
    target.hidden(filler, cache=cache)
    num_features = len(drafter.target_layer_ids) * target.hidden_size
    features = torch.zeros(batch, 4, num_features, device=device, dtype=target.model.dtype)

    def verify(width: int) -> None:
        target.logits(target.hidden(filler[:, :width], cache=cache).flatten(0, 1)).argmax(-1).tolist()
        cache.crop(-width)

    def draft(_) -> None:
        hidden = drafter(
            noise_embeds=target.embed(filler[:, :size]),
            context_hidden_states=features,
            position_ids=torch.arange(4 + size, device=device).expand(batch, -1),
        ).last_hidden_state
        target.logits(hidden[:, 1:].flatten(0, 1)).argmax(-1).tolist()

    widths = [width for width in sorted({1, 2, 3, 4, 6, 8, 12, 16, size}) if width <= size]
    times: dict[int, list[float]] = {width: [] for width in (0, *widths)}
    for _ in range(num_rounds + 1):
        for width, of_width in times.items():
            start = time.perf_counter()
            (verify if width else draft)(width)  # both end by waiting for the device
            of_width.append(time.perf_counter() - start)
    medians = {width: statistics.median(of_width[1:]) for width, of_width in times.items()}
    verify_seconds = np.interp(range(1, size + 1), widths, [medians[width] for width in widths]).tolist()
    known[batch] = num_rounds, StepCosts(verify_seconds, medians[0])
    return known[batch][1]
