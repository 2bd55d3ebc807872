"""The choice of each step: a draft, copied tokens, or neither, and how many of them to verify.

`measure_costs` times the steps on this machine. `Pace` makes the choice from these costs and from what earlier steps
gave; `Paces` keeps it, and the answers to copy from, from one response to the next.
"""

import itertools
import math
import operator
import timeit
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpace.decode.copies import NUM_KINDS, Copy, Recall
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.drafter.views import draft_block, to_predicted
from dpace.drafter.vocabulary import PackedRows
from dpace.fast.cache import TextCache
from dpace.target import Target

FILLER_TOKENS = 128
"""Number of tokens before the timed steps."""
COPY_WIDTH = 16
"""Tokens to verify of a copy, the last one of the text included; as many as in a block, where that has more."""
TIMED_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Widths that are timed, as far as a step goes."""
NUM_ROUNDS = 5
"""Number of times that each step is timed."""
SPAN = 40
"""Number of last steps that what is learned is of: what copies and drafts gave, and what steps cost."""
MARGIN = 0.05
"""Share of its seconds that a draft has to save: where it is about as fast as what it replaces, noise would choose it
too often, since a draft that seems faster than it is gets chosen more than one that seems slower."""
EXPLORATION = 0.01
"""Share of the time that may be lost by testing whether a drafter that was slower than not drafting is now faster; and
of learning that brings costs back to what was measured at first, so that none stays wrong for lack of steps."""


class StepCosts(NamedTuple):
    """Seconds of the parts of a step on this machine."""

    verify_seconds: Sequence[float]
    """Seconds in which the target reads 1, 2, ... tokens."""
    draft_seconds: float
    """Seconds of the drafter with the head."""
    read_seconds: float = 0.0
    """Seconds of the drafter for each token whose features it reads before it drafts."""


def widest_step(drafter: Drafter | None, width: int | str) -> int:
    """Return the largest number of tokens that a step with this `width` of `generate` may verify."""
    size = drafter.block_size if drafter else 1
    return max(size, COPY_WIDTH) if width in ("auto", "copies") else size


@torch.inference_mode()
def measure_costs(target: Target, drafter: Drafter | None, is_sampled: bool) -> StepCosts:
    """Measure the seconds of decoding steps on this machine; takes about a second for a small model.

    Widths that are not timed are interpolated. A width counts as no slower than a wider one. Steps take turns, and the
    minimum of `NUM_ROUNDS` rounds counts, because disturbances only make steps slower; one more round warms up.

    Memory: keys and values of `FILLER_TOKENS` tokens, and their features.

    Args:
        target: timed while it reads the tokens of steps with width `auto`.
        drafter: timed while it drafts a block, after reading a few tokens and after reading all; None takes no time.
        is_sampled: tokens are drawn, which takes longer than choosing the most likely ones.
    """
    size = widest_step(drafter, "auto")
    widths = [width for width in TIMED_WIDTHS if width < size]
    widths.append(size)
    sampler = Sampler(float(is_sampled), seed=0, device=target.device)
    filler = torch.full((1, max(FILLER_TOKENS, size)), drafter.mask_token_id if drafter else 0, device=target.device)
    text = TextCache(target.config, filler.shape[1] + size)
    text.record(size)
    _, features = target.read(filler, text, drafter.target_layer_ids if drafter else ())

    def verify(width: int) -> None:
        """Verify a number of tokens after the filler."""
        logits = target.logits(target.hidden(filler[:, :width], text)[0])
        sampler.draw(sampler.scores(logits), 0).tolist()  # waits for the device
        text.crop(-width)

    steps = [partial(verify, width) for width in widths]
    if drafter:
        rows = PackedRows(target, drafter.vocabulary)

        def draft(unread: Tensor) -> None:
            """Read features and draft a block."""
            drafted = draft_block(drafter, target, filler[:, : drafter.num_slots], unread)
            hidden = to_predicted(drafted.hidden, drafter.first_slot)
            block_size = drafter.block_size
            proposed = drafter.selector.propose(rows, hidden, filler[:, 0], drafted.context[:, -1], block_size)
            drafter.confidences(proposed.scores[0]).tolist()  # waits for the device

        steps += [partial(draft, features[:, :4]), partial(draft, features)]
    rounds = []
    for _ in range(NUM_ROUNDS + 1):
        rounds.append([timeit.timeit(step, number=1) for step in steps])
    seconds = np.min(rounds[1:], axis=0).tolist()
    short_draft, long_draft = seconds[len(widths) :] or (0.0, 0.0)
    verify_seconds = np.interp(range(1, size + 1), widths, seconds[: len(widths)])
    # From the widest to the narrowest, the least so far: noise never makes a narrow pass look slower than a wide one.
    verify_seconds = np.minimum.accumulate(verify_seconds[::-1])[::-1]
    read_seconds = max(0.0, long_draft - short_draft) / FILLER_TOKENS
    return StepCosts(verify_seconds.tolist(), short_draft, read_seconds)


class Plan(NamedTuple):
    """The choice of a step between a draft, copied tokens and a plain step."""

    is_drafted: bool
    """Whether the drafter drafts a block; otherwise the first tokens of `copy` are verified, or none."""
    copy: Copy = Copy()
    """The copy that promises most."""
    width: int = 1
    """Number of tokens to verify: the last of the text, then tokens of `copy` or, once it is made, of the draft."""
    copies: Sequence[Copy] = ()
    """All copies that were found."""
    num_unread: int = 0
    """Number of tokens that the drafter reads before it drafts."""
    is_trial: bool = False
    """Whether the draft is not expected to save `MARGIN`, and is made to learn what drafts give now."""
    promised: float = 0.0
    """Number of draft tokens that the drafter's confidences promise."""


class Mean:
    """The mean of all values so far, and of about the `SPAN` last ones later.

    Args:
        value: a first value, or an array of several that are averaged side by side.
        weight: number of values that it stands for.
    """

    def __init__(self, value: Any, weight: int):
        self.value = value
        self.weight = weight

    def add(self, new: Any) -> None:
        """Count one more value."""
        self.weight = min(self.weight + 1, SPAN)
        self.value = self.value + (new - self.value) / self.weight


def best_width(reach: Sequence[float], seconds: Sequence[float]) -> tuple[int, float]:
    """Choose the verification length that gives the most expected tokens per second.

    Args:
        reach: for each token that may be verified, the probability that it and all before it are accepted.
        seconds: of a step that verifies 1, 2, ... tokens.

    Returns:
        The width, 1 (none of them) to `len(reach) + 1`, and the expected number of emitted tokens.
    """
    # A step of width 1 emits the target's own next token, and each further token adds its chance.
    emitted = list(itertools.accumulate(reach, initial=1.0))
    rates = [count / cost for count, cost in zip(emitted, seconds, strict=False)]
    best = rates.index(max(rates))
    return best + 1, emitted[best]


class Pace:
    """A controller that decides at each step whether to draft and how many tokens to verify.

    It aims at the most tokens per second. The width maximizes
    `(1 + sum over k < width of product over i <= k of c[i]) / (draft + verify[width])`, with `c` the drafter's
    calibrated confidences. That is the surrogate that D-PACE trains for, over the time that it takes on this machine.
    To calibrate them, each is taken to the power of what confidences promised over what was accepted so far. They
    become smaller where a drafter is too sure, and larger where it is too modest. Costs follow the seconds of real
    steps: each moves its own cost towards its seconds, and others less, by how near their widths are.

    Instead of a draft, tokens that were copied from the text or from earlier answers may be verified, or none. Two
    means and one rule decide. For each kind of match before a step, means over about `SPAN` steps have how often copied
    tokens are right, and what a draft gives: its tokens, its seconds, and the seconds that copies and plain steps would
    have taken for the same tokens. A draft is made where its tokens would take `MARGIN` longer otherwise, both at the
    rate of the best copy that is at hand and by these seconds. At first one draft is taken to have given half its
    tokens, so that a drafter is trusted until it proves slower.

    Other drafts are still made for a share `EXPLORATION` of the time, and less often where the drafter would have to
    read a prompt first. So a bad drafter costs little, and one that improves is used again. Everything learned is kept
    from one response to the next (`Paces`).

    Args:
        costs: of steps on this machine.
        block_size: tokens that are verified of a whole draft.
    """

    def __init__(self, costs: StepCosts, block_size: int):
        self.costs = costs
        # Logarithms of the costs of now over `costs`: of drafts, then of each width.
        self.drift = np.zeros(len(costs.verify_seconds) + 1)
        self._apply_drift()
        # For each kind of match: how often a first copied token is right, and how often a further one.
        self.copies_right = [(Mean(0.4, 2), Mean(0.6, 2)) for _ in range(NUM_KINDS)]
        # Of drafts: emitted tokens, seconds that the same tokens would have taken otherwise, and seconds.
        half = block_size / 2
        whole_seconds = costs.draft_seconds + costs.verify_seconds[block_size - 1]
        self.drafts = Mean(np.array([half, half * costs.verify_seconds[0], whole_seconds]), 1)
        # The same by the kind of match that a copy had where the draft was made.
        self.drafts_at = [Mean(np.zeros(3), 0) for _ in range(NUM_KINDS)]
        # Draft tokens: how many the confidences promised, and how many were accepted.
        self.promised_and_accepted = Mean(np.ones(2), 1)
        self.credit = 0.0  # seconds that may be lost

    def _apply_drift(self) -> None:
        """Update the costs that steps are chosen by: relative to a plain step, in the seconds first measured for it."""
        factors = np.exp(self.drift - self.drift[1])
        self.draft_factor = float(factors[0])
        self.pass_seconds = (self.costs.verify_seconds * factors[1:]).tolist()

    def plan(self, copies: Sequence[Copy] = (), num_unread: int = 0, *, can_draft: bool = True) -> Plan:
        """Choose between a draft, copied tokens and a plain step; call this once a step.

        Args:
            copies: what could be copied, from the text and from earlier answers.
            num_unread: number of tokens that the drafter would read first.
            can_draft: False chooses between copies and a plain step only.
        """
        choices = []
        for copy in (Copy(), *copies):  # the first is a plain step
            width, emitted = self._choose_copy(copy.match, len(copy.token_ids))
            seconds = self.pass_seconds[width - 1]
            # The kind of match also counts where nothing is copied: drafts are remembered by it.
            choices.append((emitted / seconds, copy.match, width, copy))
        rate, _, width, copy = max(choices, key=operator.itemgetter(0, 1))
        plan = Plan(False, copy, width, copies, num_unread)
        if not can_draft:
            return plan
        drafts_here = self.drafts_at[copy.match]
        # What all drafts gave stands for one more draft after this kind of match.
        expected = (drafts_here.weight * drafts_here.value + self.drafts.value) / (drafts_here.weight + 1)
        tokens, seconds_otherwise, seconds = expected.tolist()
        # Against the faster of two ways to the same tokens: the best copy again and again, or what was there instead.
        loss = self.draft_factor * seconds - min(tokens / rate, seconds_otherwise)
        is_trial = loss > -MARGIN * seconds
        if is_trial:
            price = max(0.0, loss) + num_unread * self.costs.read_seconds
            # Credit is saved up to the price of one trial, or a plain step, so that it never pays for many at once.
            saved = self.credit + EXPLORATION * self.pass_seconds[width - 1]
            self.credit = min(max(self.pass_seconds[0], price), saved)
            if self.credit < price:
                return plan
            self.credit -= price
        return plan._replace(is_drafted=True, width=1, is_trial=is_trial)

    def _choose_copy(self, match: int, count: int) -> tuple[int, float]:
        """Choose how many of `count` copied tokens to verify.

        Returns:
            The width, the last token included, and the expected number of emitted tokens.
        """
        first, further = self.copies_right[match]
        return best_width([first.value * further.value**k for k in range(count)], self.pass_seconds)

    def choose_width(self, plan: Plan, confidences: Sequence[float]) -> Plan:
        """Choose the number of tokens to verify of a draft with these confidences."""
        # The chance that a slot and all before it are accepted is the product of their confidences.
        reach = list(itertools.accumulate(confidences, operator.mul))
        promised, accepted = self.promised_and_accepted.value.tolist()
        power = promised / max(accepted, 1e-300)  # which the mean of zeros rounds to 0 in the end
        calibrated = [chance**power for chance in reach]
        draft_seconds = self.draft_factor * self.costs.draft_seconds
        step_seconds = [draft_seconds + pass_seconds for pass_seconds in self.pass_seconds]
        width, _ = best_width(calibrated, step_seconds)
        width = max(width, 1 + plan.is_trial)  # a draft that is not verified teaches nothing
        return plan._replace(width=width, promised=sum(reach[: width - 1]))

    def learn(
        self,
        plan: Plan,
        token_ids: Sequence[int],
        accepted: int,
        *,
        seconds: float,
        lookups: Sequence[tuple[int, bool]] = (),
    ) -> None:
        """Learn from a step, also from a draft of which none was verified (width 1).

        Args:
            plan: of the step; of a draft, as `choose_width` returned it.
            token_ids: emitted tokens.
            accepted: number of accepted tokens.
            seconds: duration of the step.
            lookups: result of `PromptLookup.read` for each emitted token; tokens that copying would have given count
                less.
        """
        cost = self.costs.verify_seconds[plan.width - 1]
        if plan.is_drafted:
            cost += self.costs.draft_seconds + self.costs.read_seconds * plan.num_unread
            self.promised_and_accepted.add(np.array([plan.promised, accepted]))
            seconds_otherwise = sum(self._seconds_without_draft(match, is_right) for match, is_right in lookups)
            outcome = np.array([accepted + 1.0, seconds_otherwise, cost])
            self.drafts.add(outcome)
            self.drafts_at[plan.copy.match].add(outcome)
        for match, copied in plan.copies:
            # Every copy that was found is compared with the text, whether it was verified or not.
            for place, (proposed, token) in enumerate(zip(copied, token_ids, strict=False)):
                self.copies_right[match][min(place, 1)].add(proposed == token)
                if proposed != token:
                    break
        self._learn_seconds(plan, seconds / cost)

    def _seconds_without_draft(self, match: int, is_right: bool) -> float:
        """Estimate the seconds of a token: its share of the step that copies it with others, or a plain step."""
        if not is_right:
            return self.pass_seconds[0]
        width, emitted = self._choose_copy(match, len(self.pass_seconds) - 1)
        return self.pass_seconds[width - 1] / emitted

    def _learn_seconds(self, plan: Plan, ratio: float) -> None:
        """Learn from the seconds of a step, over the seconds that `costs` has for it.

        A draft's step says most of the cost of drafts, and a step without one of the cost of its width; of all other
        costs it says half as much, or less, the farther their widths are.
        """
        place = 0 if plan.is_drafted else plan.width  # in `drift`
        # A cost follows its steps in small moves, so that a disturbed step counts no more than others.
        move = np.clip(math.log(ratio) - self.drift[place], -1 / SPAN, 1 / SPAN)
        widths = np.arange(len(self.drift))
        widths[0] = plan.width  # the cost of drafts has no width, and is as near as can be
        shares = np.minimum(widths, plan.width) / np.maximum(widths, plan.width) / 2
        shares[place] = 1.0
        self.drift += shares * move - EXPLORATION / SPAN * (self.drift - self.drift[1])
        self._apply_drift()


class Paces:
    """The paces of drafters on this machine, and the answers to copy from, kept from one call to the next.

    Pass one object to several calls of `generate` or `stream`. The costs of steps are then measured once for each
    drafter, separately for greedy and sampled decoding, and each temperature has its own pace. Threads may share it:
    every text stays the target's, and what is learned in the same moment may be lost.

    Args:
        recall_mib: MiB of memory of the answers given with each drafter, see `Recall`; it starts from the answers
            that the drafter was trained on, and 0 keeps none.
    """

    def __init__(self, recall_mib: float = 0.0):
        self.recall_mib = recall_mib
        self._measure = cache(measure_costs)
        self._paces: dict[tuple[Drafter | None, float], Pace] = {}
        self._recalls: dict[Drafter | None, Recall] = {}

    def get(self, target: Target, drafter: Drafter | None, temperature: float = 0.0) -> Pace:
        """Return the drafter's pace at a temperature; at the first call, measure the machine."""
        key = drafter, temperature
        if key not in self._paces:
            costs = self._measure(target, drafter, temperature > 0)
            self._paces[key] = Pace(costs, widest_step(drafter, "full"))
        return self._paces[key]

    def recall(self, drafter: Drafter | None) -> Recall | None:
        """Return the memory of the drafter's answers; None where none are kept."""
        if self.recall_mib > 0 and drafter not in self._recalls:
            self._recalls[drafter] = Recall(self.recall_mib)
            if drafter:
                self._recalls[drafter].add(drafter.answers)
        return self._recalls.get(drafter)

    def for_other(self, drafter: Drafter | None, other: Drafter) -> "Paces":
        """Return the paces of another drafter in the place of one, with the answers to copy from of that."""
        paces = Paces(self.recall_mib)
        paces._recalls[other] = self._recalls.get(drafter, Recall(self.recall_mib))
        return paces
