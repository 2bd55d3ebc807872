"""The choice of each step: a draft, copied tokens, or neither, and how many of them to verify.

`Pace` makes the choice from the costs of steps on this machine and from what earlier steps gave; `Paces` keeps it from
one response to the next. `PromptLookup` finds earlier tokens to copy, at almost no cost.
"""

import itertools
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dpace.decode.costs import FILLER_TOKENS, StepCosts, measure_costs
from dpace.drafter import Drafter
from dpace.target import Target

MAX_MATCH = 3
"""Largest number of last tokens that are looked up."""
EXPLORATION = 0.01
"""Share of the tokens that may be lost by testing whether a drafter that was slower than not drafting is now faster."""
DECAY = 0.95
"""Factor of the past in the running sums, applied at each draft."""
GAIN_DECAY = 0.98
"""The same factor for the gain of drafts, which varies much: with a smaller one, bad luck would end drafting."""
PRIOR_TOKENS = 1.0
"""Initial sums of promised and of kept tokens, before the first draft."""
COPY_PRIOR = (0.2, 0.5)
"""Initial rates at which the first and a further token of a prompt lookup are right; they count as two observations."""
PRIOR_GAIN = 1.1
"""Initial gain of a whole draft over plain decoding; a drafter is trusted until it proves slower."""


class Plan(NamedTuple):
    """The choice of a step between a draft, copied tokens and a plain step."""

    is_drafted: bool
    """Whether the drafter drafts a block; otherwise the first tokens of `copied` are verified, or none."""
    match: int = 0
    """Length of the prompt lookup's match; 0 for none."""
    copied: Sequence[int] = ()
    """Tokens that followed the match."""
    width: int = 1
    """Number of tokens to verify where nothing is drafted: the last token of the text, then those of `copied`."""
    loss: float = 0.0
    """Tokens that a draft is expected to lose against the best other choice; negative where it gains."""


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
    Two corrections apply. Confidences that promised more than was accepted so far are scaled down. Costs are scaled by
    the seconds of real steps, because they were measured within one second, in a loop without the work around a step.

    Instead of a draft, the tokens of a prompt lookup may be verified, or none. The rate at which lookups are right is
    tracked at every step, by the length of the match, and separately for the first token and further ones. The gain of
    drafts is tracked by the same length. The option that promises most is chosen. A drafted token that copying would
    have given one step later counts only for its share of that step.

    Drafts that promise less than the other options are still made for a share `EXPLORATION` of the tokens, and less
    often where the drafter would have to read a prompt first. So a bad drafter costs little, and one that improves is
    used again. Everything learned is kept from one response to the next (`Paces`).
    """

    def __init__(self, costs: StepCosts):
        self.costs = costs
        self.copy_costs = replace(costs, draft_seconds=0.0)
        self.copy_rates = {length: [Rate(2 * p, 2.0) for p in COPY_PRIOR] for length in range(1, MAX_MATCH + 1)}
        seconds = costs.draft_seconds + costs.verify_seconds[-1]
        self.all_drafted = DraftSums(PRIOR_GAIN * costs.plain_rate * seconds, PRIOR_GAIN * seconds, seconds, 1.0)
        self.drafted = {length: DraftSums() for length in range(MAX_MATCH + 1)}  # by the length of the match
        self.slowness = {"plain": 1.0, "drafted": 1.0}  # running means of a step's seconds over those of `costs`
        self.promised = PRIOR_TOKENS
        self.kept = PRIOR_TOKENS
        self.credit = 0.0
        self.reading = costs.reading_seconds / FILLER_TOKENS * costs.plain_rate  # tokens lost by reading one token

    def plan(self, match: int = 0, copied: Sequence[int] = (), num_unread: int = 0) -> Plan:
        """Choose between a draft, copied tokens and a plain step; call this once a step.

        Args:
            match: length of the prompt lookup's match; 0 for none.
            copied: the tokens that it proposes.
            num_unread: number of tokens that the drafter would read first.
        """
        width, promised = self._choose_copy(match, len(copied))
        sums = self.drafted[match].plus(self.all_drafted.average())
        seconds = sums.seconds * self.slowness["drafted"] / self.slowness["plain"]
        loss_now = promised / self.costs.verify_seconds[width - 1] * seconds - sums.tokens
        loss_later = (seconds - sums.plain_seconds) * self.costs.plain_rate
        loss = max(loss_now, loss_later) / sums.drafts
        if loss > 0:
            price = loss + num_unread * self.reading
            self.credit = min(max(1.0, price), self.credit + EXPLORATION * promised)
            if self.credit < price:
                return Plan(False, match, copied, width, loss)
            self.credit -= price
        return Plan(True, match, copied, loss=loss)

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
        width, _ = self.costs.best_width([trust * probability for probability in reach])
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
        seconds: float | None,
        lookups: Sequence[tuple[int, bool]],
    ) -> None:
        """Learn from a step that drafted, even where none of the draft was verified (width 1).

        Args:
            plan: of the step.
            width: number of tokens that were verified.
            accepted: number of accepted draft tokens.
            promised: as `choose_width` returned.
            seconds: duration of the step; None where the drafter also read the prompt, which other drafts do not.
            lookups: result of `PromptLookup.read` for each emitted token; tokens that copying would have given count
                less.
        """
        cost = self.costs.draft_seconds + self.costs.verify_seconds[width - 1]
        if seconds is not None:
            self._learn_slowness("drafted", seconds / cost)
        self.promised = DECAY * self.promised + promised
        self.kept = DECAY * self.kept + accepted
        plain = self.costs.verify_seconds[0]
        plain_seconds = sum(self._copy_seconds(match) if is_right else plain for match, is_right in lookups)
        new = DraftSums(accepted + 1.0, plain_seconds, cost, 1.0)
        self.all_drafted = self.all_drafted.plus(new, GAIN_DECAY)
        self.drafted[plan.match] = self.drafted[plan.match].plus(new, GAIN_DECAY)

    def _copy_seconds(self, match: int) -> float:
        """Estimate the seconds of a token that could be copied.

        That is its share of the step that copies it with others, or the whole of a plain step.
        """
        width, promised = self._choose_copy(match, len(self.costs.verify_seconds) - 1)
        return self.costs.verify_seconds[width - 1] / promised

    def learn_plain(self, seconds: float, width: int = 1) -> None:
        """Learn from a step of `width` tokens that did not draft."""
        self._learn_slowness("plain", seconds / self.costs.verify_seconds[width - 1])

    def learn_copying(self, plan: Plan, emitted: Sequence[int]) -> None:
        """Learn how many tokens of a prompt lookup's proposal were right."""
        for k, (proposed, token) in enumerate(zip(plan.copied, emitted, strict=False)):
            self.copy_rates[plan.match][min(k, 1)].add(proposed == token)
            if proposed != token:
                break

    def _learn_slowness(self, kind: str, ratio: float) -> None:
        """Update the slowness by one step, whose ratio is limited to 2 so that a disturbed step counts less."""
        self.slowness[kind] += (1 - DECAY) * (min(2.0, ratio) - self.slowness[kind])


class Paces:
    """The paces of drafters on this machine, kept from one call to the next.

    Pass one object to several calls of `generate` or `stream`. The costs of steps are then measured once for each
    drafter, separately for greedy and sampled decoding, and each temperature has its own pace.
    """

    def __init__(self):
        self._paces: weakref.WeakKeyDictionary[Drafter, dict[float, Pace]] = weakref.WeakKeyDictionary()

    def get(self, target: Target, drafter: Drafter, temperature: float = 0.0) -> Pace:
        """Return the drafter's pace at a temperature; at the first call, measure the machine."""
        paces = self._paces.setdefault(drafter, {})
        if temperature not in paces:
            measured = (pace.costs for other, pace in paces.items() if (other > 0) == (temperature > 0))
            costs = next(measured, None) or measure_costs(target, drafter, temperature=temperature)
            paces[temperature] = Pace(costs)
        return paces[temperature]


class PromptLookup:
    """An index of the most recent occurrence of every one, two and three tokens in a row.

    Memory: O(`MAX_MATCH` x tokens); time: O(`MAX_MATCH`) a token, once.

    Args:
        text: the tokens so far; the list may grow later.

    Source: prompt lookup decoding (A. Saxena, 2023), in transformers as `prompt_lookup_num_tokens`.
    """

    def __init__(self, text: list[int]):
        self.text = text
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(MAX_MATCH)]
        self._num_read = 1
        self.read()

    def read(self) -> list[tuple[int, bool]]:
        """Index the tokens added to the text since the last call.

        Returns:
            For each of these tokens, the length of the match before it, and whether copying would have been right.
        """
        text = self.text
        outcomes = []
        for position in range(self._num_read, len(text)):
            match, start = self._find(position)
            outcomes.append((match, start is not None and text[start] == text[position]))
            for length in range(1, min(MAX_MATCH, position) + 1):
                self._after[length - 1][tuple(text[position - length : position])] = position
        self._num_read = max(1, len(text))
        return outcomes

    def _find(self, end: int) -> tuple[int, int | None]:
        """Find the longest match of the tokens before `end`.

        Returns:
            Its length, and the position after its earlier occurrence; 0 and None where the last token is new.
        """
        for length in range(min(MAX_MATCH, end), 0, -1):
            start = self._after[length - 1].get(tuple(self.text[end - length : end]))
            if start is not None:
                return length, start
        return 0, None

    def propose(self, count: int) -> tuple[int, list[int]]:
        """Propose the tokens that followed the longest match.

        The copy may reach into the proposal itself, as in a text that repeats.

        Returns:
            Length of the match, and `count` tokens; 0 and an empty list where the last token is new.
        """
        self.read()
        length, start = self._find(len(self.text))
        if start is None:
            return 0, []
        proposal = self.text[start : start + count]
        while len(proposal) < count:
            proposal.append(proposal[start - len(self.text)])
        return length, proposal
