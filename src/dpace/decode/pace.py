"""The choice of each step: a draft, copied tokens, or neither, and how many of them to verify.

`Pace` makes the choice from the costs of steps on this machine and from what earlier steps gave; `Paces` keeps it, and
the answers to copy from, from one response to the next.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

from dpace.decode.copies import MAX_MATCH, NUM_KINDS, Copy, Recall
from dpace.decode.costs import FILLER_TOKENS, StepCosts, measure_costs
from dpace.drafter import Drafter
from dpace.target import Target

EXPLORATION = 0.01
"""Share of the tokens that may be lost by testing whether a drafter that was slower than not drafting is now faster."""
DECAY = 0.95
"""Factor of the past in the running sums, applied at each draft."""
GAIN_DECAY = 0.98
"""The same factor for the gain of drafts, which varies much: with a smaller one, bad luck would end drafting."""
COST_RATE = 0.05
"""Share of a step's error by which the costs are corrected."""
MAX_COST_ERROR = 0.3
"""Largest relative error of a step that counts, so that a disturbed step counts little more than others."""
VISIT_DECAY = 0.99
"""Factor of the past in the number of steps of a kind, applied at each step."""
COST_FORGETTING = 0.0003
"""Share by which each step brings the costs, over that of a plain step, back to those that were measured."""
PRIOR_TOKENS = 1.0
"""Initial sums of promised and of kept tokens, before the first draft."""
COPY_PRIOR = (0.2, 0.5)
"""Initial rates at which the first and a further token copied from the text are right, as two observations."""
RECALLED_PRIOR = (0.5, 0.8)
"""The same for tokens of earlier answers, which count where requests are alike."""
PRIOR_GAIN = 1.1
"""Initial gain of a whole draft over plain decoding; a drafter is trusted until it proves slower."""


class Plan(NamedTuple):
    """The choice of a step between a draft, copied tokens and a plain step."""

    is_drafted: bool
    """Whether the drafter drafts a block; otherwise the first tokens of `copy` are verified, or none."""
    copy: Copy = Copy()
    """The copy that promises most."""
    width: int = 1
    """Number of tokens to verify where nothing is drafted: the last token of the text, then those of `copy`."""
    loss: float = 0.0
    """Tokens that a draft is expected to lose against the best other choice; negative where it gains."""
    copies: Sequence[Copy] = ()
    """All copies that were found."""


class DraftSums(NamedTuple):
    """Decaying sums over drafts."""

    tokens: float = 0.0
    """Emitted tokens."""
    plain_seconds: float = 0.0
    """Seconds that these tokens would have taken without drafts."""
    seconds: float = 0.0
    drafts: float = 0.0

    def plus(self, new: "DraftSums", decay: float = 1.0) -> "DraftSums":
        """Return the sums after `new`, with a factor for the past."""
        return DraftSums(*(decay * past + value for past, value in zip(self, new, strict=True)))

    def average(self) -> "DraftSums":
        """Return the sums of an average draft."""
        return DraftSums(*(value / self.drafts for value in self))


@dataclass
class Rate:
    """A decaying rate of right guesses."""

    right: float
    total: float

    @property
    def value(self) -> float:
        """The rate, 0 to 1."""
        return self.right / self.total

    def add(self, is_right: bool) -> None:
        """Count one more guess."""
        self.right = DECAY * self.right + is_right
        self.total = DECAY * self.total + 1


class Pace:
    """A controller that decides at each step whether to draft and how many tokens to verify.

    It aims at the most tokens per second. The width maximizes
    `(1 + sum over k < width of product over i <= k of c[i]) / (draft + verify[width])`, with `c` the drafter's
    calibrated confidences. That is the surrogate that D-PACE trains for, over the time that it takes on this machine.
    Two corrections apply. Confidences that promised more than was accepted so far are scaled down. Costs follow the
    seconds of real steps, because they were measured within one second, in a loop without the work around a step, and
    a machine's speed changes. Each width, and the step with a draft, has its own correction, a robust running mean;
    an error counts for other widths by how near they are, and half for drafts.

    Instead of a draft, tokens that were copied from the text or from earlier answers may be verified, or none. The rate
    at which copies are right is tracked at every step, by the kind of the match, and separately for the first token and
    further ones. The gain of drafts is tracked by the same kind. The option that promises most is chosen. A drafted
    token that copying would have given one step later counts only for its share of that step.

    Drafts that promise less than the other options are still made for a share `EXPLORATION` of the tokens, and less
    often where the drafter would have to read a prompt first. So a bad drafter costs little, and one that improves is
    used again. Everything learned is kept from one response to the next (`Paces`).
    """

    def __init__(self, costs: StepCosts):
        self.costs = costs
        self.drift = [0.0] * (len(costs.verify_seconds) + 1)  # logarithms of seconds over `costs`: drafts, then widths
        self.visits = [0.0] * len(self.drift)  # decaying numbers of these steps
        self._correct_costs()
        priors = (COPY_PRIOR if kind <= MAX_MATCH else RECALLED_PRIOR for kind in range(NUM_KINDS))
        self.copy_rates = [[Rate(2 * p, 2.0) for p in prior] for prior in priors]
        seconds = costs.draft_seconds + costs.verify_seconds[-1]
        self.all_drafted = DraftSums(PRIOR_GAIN * costs.plain_rate * seconds, PRIOR_GAIN * seconds, seconds, 1.0)
        self.drafted = [DraftSums()] * NUM_KINDS  # by the kind of the match
        self.promised = PRIOR_TOKENS
        self.kept = PRIOR_TOKENS
        self.credit = 0.0
        self.reading = costs.reading_seconds / FILLER_TOKENS * costs.plain_rate  # tokens lost by reading one token

    def plan(self, copies: Sequence[Copy] = (), num_unread: int = 0, *, can_draft: bool = True) -> Plan:
        """Choose between a draft, copied tokens and a plain step; call this once a step.

        Args:
            copies: what could be copied, from the text and from earlier answers.
            num_unread: number of tokens that the drafter would read first.
            can_draft: False chooses between copies and a plain step only.
        """
        choices = [(copy, self._choose_copy(copy.match, len(copy.token_ids))) for copy in [Copy(), *copies]]
        seconds_of = self.copy_costs.verify_seconds
        copy, best = min(choices, key=lambda choice: (seconds_of[choice[1][0] - 1] / choice[1][1], -choice[0].match))
        width, promised = best
        if not can_draft:
            return Plan(False, copy, width, copies=copies)
        sums = self.drafted[copy.match].plus(self.all_drafted.average())
        seconds = sums.seconds * math.exp(self.drift[0] - self.drift[1])
        loss_now = promised / seconds_of[width - 1] * seconds - sums.tokens
        loss_later = (seconds - sums.plain_seconds) * self.costs.plain_rate
        loss = max(loss_now, loss_later) / sums.drafts
        is_drafted = True
        if loss > 0:
            price = loss + num_unread * self.reading
            self.credit = min(max(1.0, price), self.credit + EXPLORATION * promised)
            is_drafted = self.credit >= price
            self.credit -= price * is_drafted
        return Plan(is_drafted, copy, width, loss, copies)

    def _choose_copy(self, match: int, count: int) -> tuple[int, float]:
        """Choose how many of `count` copied tokens to verify.

        Returns:
            The width, the last token included, and the expected number of emitted tokens.
        """
        if not count:
            return 1, 1.0
        first, further = (rate.value for rate in self.copy_rates[match])
        return self.copy_costs.best_width([first * further**k for k in range(count)])

    def choose_width(self, plan: Plan, confidences: Sequence[float]) -> tuple[int, float]:
        """Choose the number of tokens to verify of a draft with these confidences.

        Returns:
            The width, the last token included, and the number of draft tokens that the confidences promise of it.
        """
        trust = min(1.0, self.kept / self.promised)
        reach = list(itertools.accumulate(confidences, operator.mul))
        width, _ = self.draft_costs.best_width([trust * probability for probability in reach])
        if width == 1 and plan.loss > 0:  # a draft that is not verified teaches nothing
            width = 2
        return width, sum(reach[: width - 1])

    def learn_drafting(
        self,
        plan: Plan,
        width: int,
        accepted: int,
        *,
        promised: float,
        seconds: float,
        num_unread: int = 0,
        lookups: Sequence[tuple[int, bool]],
    ) -> None:
        """Learn from a step that drafted, even where none of the draft was verified (width 1).

        Args:
            plan: of the step.
            width: number of tokens that were verified.
            accepted: number of accepted draft tokens.
            promised: as `choose_width` returned.
            seconds: duration of the step.
            num_unread: number of tokens that the drafter read first.
            lookups: result of `PromptLookup.read` for each emitted token; tokens that copying would have given count
                less.
        """
        reading = self.costs.reading_seconds / FILLER_TOKENS * num_unread
        cost = self.costs.draft_seconds + reading + self.costs.verify_seconds[width - 1]
        self._learn_seconds(width, seconds / cost, is_drafted=True)
        self.promised = DECAY * self.promised + promised
        self.kept = DECAY * self.kept + accepted
        plain = self.costs.verify_seconds[0]
        plain_seconds = sum(self._copy_seconds(match) if is_right else plain for match, is_right in lookups)
        new = DraftSums(accepted + 1.0, plain_seconds, cost, 1.0)
        self.all_drafted = self.all_drafted.plus(new, GAIN_DECAY)
        self.drafted[plan.copy.match] = self.drafted[plan.copy.match].plus(new, GAIN_DECAY)

    def _copy_seconds(self, match: int) -> float:
        """Estimate the seconds of a token that could be copied.

        That is its share of the step that copies it with others, or the whole of a plain step.
        """
        width, promised = self._choose_copy(match, len(self.costs.verify_seconds) - 1)
        return self.copy_costs.verify_seconds[width - 1] / promised

    def learn_plain(self, seconds: float, width: int = 1) -> None:
        """Learn from a step of `width` tokens that did not draft."""
        self._learn_seconds(width, seconds / self.costs.verify_seconds[width - 1])

    def learn_copying(self, plan: Plan, emitted: Sequence[int]) -> None:
        """Learn how many tokens of each copy that was found were right."""
        for match, copied in plan.copies:
            for k, (proposed, token) in enumerate(zip(copied, emitted, strict=False)):
                self.copy_rates[match][min(k, 1)].add(proposed == token)
                if proposed != token:
                    break

    def _learn_seconds(self, width: int, ratio: float, *, is_drafted: bool = False) -> None:
        """Learn from the seconds of a step over those of `costs`.

        Kinds of steps that were not taken for long learn faster, and the others as much as they are near.
        """
        kind = 0 if is_drafted else width
        error = max(-MAX_COST_ERROR, min(MAX_COST_ERROR, ratio / math.exp(self.drift[kind]) - 1))
        own_rate = max(COST_RATE, 1 / (2 + self.visits[kind]))
        plain = self.drift[1]
        for other, drift in enumerate(self.drift):
            nearness = min(width, other or width) / max(width, other) / (1 if kind and other else 2)
            rate = own_rate if other == kind else COST_RATE * nearness
            self.drift[other] += rate * error - COST_FORGETTING * (drift - plain)
            self.visits[other] = VISIT_DECAY * self.visits[other] + (other == kind)
        self._correct_costs()

    def _correct_costs(self) -> None:
        """Bring the costs that are chosen by to those of now, over that of a plain step."""
        draft, *passes = (math.exp(drift - self.drift[1]) for drift in self.drift)
        seconds = [cost * factor for cost, factor in zip(self.costs.verify_seconds, passes, strict=True)]
        self.draft_costs = replace(self.costs, verify_seconds=seconds, draft_seconds=self.costs.draft_seconds * draft)
        self.copy_costs = replace(self.draft_costs, draft_seconds=0.0)


class Paces:
    """The paces of drafters on this machine, and the answers to copy from, kept from one call to the next.

    Pass one object to several calls of `generate` or `stream`. The costs of steps are then measured once for each
    drafter, separately for greedy and sampled decoding, and each temperature has its own pace. Threads may share it:
    every text stays the target's, and what is learned in the same moment may be lost.

    Args:
        recall_mib: MiB of memory of the answers given with each drafter, see `Recall`; it starts from those that the
            drafter was trained on, and 0 keeps none.
    """

    def __init__(self, recall_mib: float = 0.0):
        self.recall_mib = recall_mib
        self._paces: WeakKeyDictionary[Drafter, dict[float, Pace]] = WeakKeyDictionary()
        self._recalls: WeakKeyDictionary[Drafter, Recall] = WeakKeyDictionary()

    def get(self, target: Target, drafter: Drafter, temperature: float = 0.0) -> Pace:
        """Return the drafter's pace at a temperature; at the first call, measure the machine."""
        paces = self._paces.setdefault(drafter, {})
        if temperature not in paces:
            measured = (pace.costs for other, pace in paces.items() if (other > 0) == (temperature > 0))
            costs = next(measured, None) or measure_costs(target, drafter, temperature=temperature)
            paces[temperature] = Pace(costs)
        return paces[temperature]

    def recall(self, drafter: Drafter) -> Recall | None:
        """Return the memory of the drafter's answers; None where none are kept."""
        if self.recall_mib > 0 and drafter not in self._recalls:
            self._recalls[drafter] = Recall(self.recall_mib)
            self._recalls[drafter].add(drafter.answers)
        return self._recalls.get(drafter)
