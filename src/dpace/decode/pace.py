"""Confidences and step times in; how many slots are worth verifying, and whether drafting is worth it at all, out."""

import itertools
import operator
import weakref
from collections.abc import Sequence
from dataclasses import replace

from dpace.decode.costs import FILLER_TOKENS, StepCosts, measure_costs
from dpace.decode.lookup import MAX_MATCH
from dpace.drafter import Drafter
from dpace.target import Target

EXPLORATION = 0.01
"""Share of the tokens that may be lost to finding out whether a drafter that does not pay has begun to."""
DECAY = 0.95
"""Weight of the past in the running sums, a draft."""
GAIN_DECAY = 0.98
"""The same of what drafts gave, which differs much from one to the next: with less, bad luck would end drafting."""
PRIOR_TOKENS = 1.0
"""Promised and kept ones before the first draft."""
COPY_PRIOR = (0.2, 0.5)
"""How often the first and a further token of a prompt lookup is right, before the first one; it counts as two of them."""
PRIOR_GAIN = 1.1
"""Of the whole draft that a drafter begins with, over plain decoding: it is trusted until it is found wanting."""


class Pace:
    """Decides, step by step, whether to draft and how wide to verify, so as to emit the most tokens a second.

    The width maximizes `(1 + sum over k < width of product over i <= k of c[i]) / (draft + verify[width])` with `c` the drafter's
    calibrated confidences: the surrogate that D-PACE trains for, over the time that it takes here. Confidences that promise
    more than is accepted are scaled down by what was found so far, and costs are corrected by what steps took: those were measured in
    a loop, without all that surrounds a step, and in one second of the machine.

    Instead of a draft, what a prompt lookup proposes may be verified, or nothing. How often lookups are right is seen at every step,
    by the length of the match and apart for the first token and further ones; what drafts give, when there are some, by the same
    length. The one that promises most is taken; what a draft gives and copying would have given a step later counts only for its share
    of that step. Drafts that promise less are made for `EXPLORATION` of the tokens, less where the drafter would have to read a prompt
    first: a bad drafter costs little, and one that gets good is found again. What was learned is kept from one response to the next
    (`Paces`).
    """

    def __init__(self, costs: StepCosts):
        self.costs, self.copy_costs = costs, replace(costs, draft_seconds=0.0)
        self.copied = {length: [[2 * p, 2.0] for p in COPY_PRIOR] for length in range(1, MAX_MATCH + 1)}
        seconds = costs.draft_seconds + costs.verify_seconds[-1]
        # Tokens, seconds that these would have taken without drafts, seconds, and drafts: of all and by length of the match.
        self.all_drafted: tuple[float, ...] = (
            PRIOR_GAIN * costs.plain_rate * seconds,
            PRIOR_GAIN * seconds,
            seconds,
            1.0,
        )
        self.drafted: dict[int, tuple[float, ...]] = dict.fromkeys(range(MAX_MATCH + 1), (0.0, 0.0, 0.0, 0.0))
        self.slowness = {"plain": 1.0, "drafted": 1.0}  # a running mean of seconds over those of `costs`
        self.promised = self.kept = PRIOR_TOKENS
        self.credit, self._match, self._loss = 0.0, 0, 0.0
        self.reading = costs.reading_seconds / FILLER_TOKENS * costs.plain_rate  # tokens lost to reading one

    def plan(self, match: int, count: int, num_unread: int = 0) -> tuple[int, bool]:
        """What the next step is to do; called once a step.

        Args:
            match: tokens that the prompt lookup found again; 0 for none.
            count: tokens that it proposes.
            num_unread: tokens that the drafter would read first.

        Returns:
            Tokens of the proposal to verify, the last token included (1: none of it), and whether to draft.
        """
        width, promised = self._copy(match, count)
        average = (x / self.all_drafted[3] for x in self.all_drafted)  # counts as one more draft
        tokens, seconds_without, seconds, drafts = map(operator.add, self.drafted[match], average)
        seconds *= self.slowness["drafted"] / self.slowness["plain"]
        here = promised / self.costs.verify_seconds[width - 1] * seconds - tokens
        further_on = (seconds - seconds_without) * self.costs.plain_rate
        self._match, self._loss = match, max(here, further_on) / drafts  # tokens that a draft costs
        if self._loss > 0:
            price = self._loss + num_unread * self.reading
            self.credit = min(max(1.0, price), self.credit + EXPLORATION * promised)
            if self.credit < price:
                return width, False
            self.credit -= price
        return 1, True

    def _copy(self, match: int, count: int) -> tuple[int, float]:
        """How many tokens of a proposal to verify, the last token included, and how many will be emitted."""
        if not count:
            return 1, 1.0
        first, further = (right / total for right, total in self.copied[match])
        return self.copy_costs.best_width([first * further**k for k in range(count)])

    def width(self, confidences: Sequence[float]) -> int:
        """Tokens to verify after a draft with these confidences, the last token included."""
        trust = min(1.0, self.kept / self.promised)
        self._reach = list(itertools.accumulate(confidences, operator.mul))
        width, _ = self.costs.best_width([trust * reach for reach in self._reach])
        if width == 1 and self._loss > 0:  # nothing is learned of a draft that is not verified
            return 2
        return width

    def record(
        self, width: int, accepted: int, seconds: float | None, seen: Sequence[tuple[int, bool]] | None = None
    ) -> None:
        """Learn from a step that drafted, also where nothing of the draft was verified (width 1).

        Args:
            width: tokens that were verified.
            accepted: of the draft.
            seconds: that the step took; None where the drafter also read the prompt, which is not what a draft takes.
            seen: for each emitted token, as `PromptLookup.read` tells: it was worth little if it would have been copied.
        """
        cost = self.costs.draft_seconds + self.costs.verify_seconds[width - 1]
        if seconds is not None:
            self._learn_slowness("drafted", seconds / cost)
        self.promised = DECAY * self.promised + sum(self._reach[: width - 1])
        self.kept = DECAY * self.kept + accepted
        plain = self.costs.verify_seconds[0]
        seconds_without = (accepted + 1) * plain
        if seen is not None:
            seconds_without = sum(self._copy_seconds(match) if is_right else plain for match, is_right in seen)
        new = accepted + 1.0, seconds_without, cost, 1.0
        self.all_drafted, self.drafted[self._match] = (
            tuple(GAIN_DECAY * x + y for x, y in zip(past, new, strict=True))
            for past in (self.all_drafted, self.drafted[self._match])
        )

    def _copy_seconds(self, match: int) -> float:
        """Of a token that could be copied: a share of the step that copies it and others, or all of a plain step."""
        width, promised = self._copy(match, len(self.costs.verify_seconds) - 1)
        return self.costs.verify_seconds[width - 1] / promised

    def record_plain(self, seconds: float, width: int = 1) -> None:
        """Learn from a step that did not draft, of so many tokens."""
        self._learn_slowness("plain", seconds / self.costs.verify_seconds[width - 1])

    def learn_copying(self, match: int, proposal: Sequence[int], emitted: Sequence[int]) -> None:
        """See how much of what a prompt lookup proposed was right."""
        for k, (proposed, token) in enumerate(zip(proposal, emitted, strict=False)):
            rate = self.copied[match][min(k, 1)]
            rate[0] = DECAY * rate[0] + (proposed == token)
            rate[1] = DECAY * rate[1] + 1
            if proposed != token:
                break

    def _learn_slowness(self, kind: str, ratio: float) -> None:
        """One step's share; a step that was disturbed counts as twice as slow at most."""
        self.slowness[kind] += (1 - DECAY) * (min(2.0, ratio) - self.slowness[kind])


class Paces:
    """Keep what decoding learned about drafters on this machine, from one call to the next.

    Pass one object to several calls of `generate` or `stream`: the costs of steps are measured once for each drafter, greedy and
    sampled, and each temperature has a pace of its own.
    """

    def __init__(self):
        self._costs: weakref.WeakKeyDictionary[Drafter, dict[bool, StepCosts]] = weakref.WeakKeyDictionary()
        self._paces: weakref.WeakKeyDictionary[Drafter, dict[float, Pace]] = weakref.WeakKeyDictionary()

    def get(self, target: Target, drafter: Drafter, temperature: float = 0.0) -> Pace:
        """Give the drafter's pace at a temperature; measures the machine first where that is not done yet."""
        known, costs = self._paces.setdefault(drafter, {}), self._costs.setdefault(drafter, {})
        is_sampled = temperature > 0
        if is_sampled not in costs:
            costs[is_sampled] = measure_costs(target, drafter, temperature=temperature)
        if temperature not in known:
            known[temperature] = Pace(costs[is_sampled])
        return known[temperature]
