"""Speculative and plain decoding of one prompt.

How drafts are made and verified: settings, the choice of a step, and what the target is to verify.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpace.config import VerifyRule, Width
from dpace.decode.generation import Generation, Step, collect
from dpace.decode.pace import Pace, Paces, PromptLookup
from dpace.decode.request import Continuation, SamplingOptions, make_continuation
from dpace.decode.sampling import draw_draft, verify_draft, verify_sampled
from dpace.drafter import Drafter
from dpace.drafter.views import draft_block, mask_blocks
from dpace.drafter.vocabulary import DraftHead
from dpace.fast.cache import Mark, go_back, make_cache, mark_states, rewind
from dpace.fast.packing import look_again
from dpace.target import Target


@dataclass(frozen=True)
class Drafting:
    """Settings of drafting and verification, resolved from the options of `generate` for one drafter."""

    block_size: int
    """Number of slots to draft, the anchor included."""
    max_width: int
    """Largest number of tokens that the target verifies at once, the last token included."""
    verify_rule: VerifyRule
    pace: Pace | None
    """Chooses at each step the verification length, and between drafts and copies; None always verifies `max_width`."""


def make_drafting(
    target: Target,
    drafter: Drafter,
    temperature: float,
    *,
    width: Width = "auto",
    block_size: int | None = None,
    verify_rule: VerifyRule = "equality",
    paces: Paces | None = None,
) -> Drafting:
    """Check the options of `generate`, and find the pace for width `auto`.

    Arguments as in `generate`.

    Raises:
        ValueError: a drafter for another target, or a block size or width outside its range.
    """
    drafter.check_target(target)
    look_again(drafter)
    block_size = block_size or drafter.block_size
    if not 2 <= block_size <= drafter.block_size:
        raise ValueError(f"block_size is {block_size}; this drafter drafts blocks of 2 to {drafter.block_size} slots")
    max_width = width if isinstance(width, int) else block_size
    if not 2 <= max_width <= block_size:
        raise ValueError(
            f"width is {width}; a block of {block_size} has 2 to {block_size} tokens to verify: "
            "give such a number, 'full' or 'auto'"
        )
    pace = (paces or Paces()).get(target, drafter, temperature) if width == "auto" else None
    return Drafting(block_size, max_width, verify_rule, pace)


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


class Proposal(NamedTuple):
    """The tokens that the target verifies in a step."""

    block: Int[Tensor, "1 width"]
    """The last token of the text, then the proposed tokens."""
    num_read: int = 0
    """Number of tokens whose features the drafter read before it drafted."""
    draft_probs: Float[Tensor, "draft vocab"] | None = None
    """Distributions that the draft tokens were drawn from; None where they are not draws."""

    @property
    def width(self) -> int:
        """Number of tokens that the target reads."""
        return self.block.shape[1]


class Speculation:
    """The state of decoding one response: text, both caches, and features that the drafter has not read.

    Between steps the target's cache holds exactly the tokens before the last one; the drafter's cache and the unread
    features together cover the same tokens. The loop is in `steps`.
    """

    def __init__(
        self, target: Target, drafter: Drafter, text: Continuation, drafting: Drafting, captured: list[Tensor]
    ):
        self.target, self.drafter, self.text, self.drafting, self.captured = target, drafter, text, drafting, captured
        capacity = len(text.text) + text.max_new_tokens + drafting.block_size
        self.cache, self.drafter_cache = make_cache(target.config, capacity), make_cache(drafter.config, capacity)
        self.unread: list[list[Tensor]] = []  # features by layer
        self.mark: Mark = []  # recurrent states before the last verification, where the target has any
        self.num_read = 0
        self.lookup = PromptLookup(text.text)
        self.samples_draft = drafting.verify_rule == "speculative" and text.sampler.temperature > 0
        # Processors may allow only tokens outside of a vocabulary, and then no draft could be drawn.
        is_whole = self.samples_draft and text.sampler.processors
        self.draft_head = DraftHead(target, None if is_whole else drafter.vocabulary, text.text)

    def steps(self) -> Iterator[Step]:
        """Yield the first token, then the tokens that each verification emits."""
        yield self.read_prompt()
        while not self.text.is_done:
            started = time.perf_counter()
            plan = self.plan()
            proposal = self.propose(plan)
            accepted, token_ids = self.verify(proposal)
            yield self.emit(plan, proposal, accepted, token_ids, started)

    def read_prompt(self) -> Step:
        """Read the prompt and emit the first token."""
        prompt = torch.tensor([self.text.text], device=self.target.device)
        logits = self.target.logits(self.target.hidden(prompt, cache=self.cache)[0, -1:])
        self.unread.append(self.captured[:])
        token_ids, _ = self.text.take(0, self.text.draw(logits).tolist())
        return Step(token_ids, 0, 0)

    def plan(self) -> Plan:
        """Choose between a draft, a copy of the tokens that followed the last ones before, and a plain step."""
        pace = self.drafting.pace
        if pace is None:
            return Plan(is_drafted=True)
        match, copied = self.lookup.propose(min(self.drafting.block_size, self.text.remaining) - 1)
        width, is_drafted = pace.plan(match, len(copied), len(self.text.text) - 1 - self.num_read)
        return Plan(is_drafted, match, copied, width)

    def propose(self, plan: Plan) -> Proposal:
        """Make the tokens that the target verifies."""
        if not plan.is_drafted:
            last_and_copied = [self.text.text[-1], *plan.copied[: plan.width - 1]]
            return Proposal(torch.tensor([last_and_copied], device=self.target.device))
        block = mask_blocks(self.drafter, self.text.text[-1:], self.drafting.block_size)
        hidden, num_read = self._draft(block)
        logits = self.draft_head.logits(hidden)
        tokens, width, draft_probs = self.draft_head.tokens(logits), len(logits) + 1, None
        sampler, pace = self.text.sampler, self.drafting.pace
        if pace is not None:
            width = pace.width(self.drafter.confidences(logits))
        if self.samples_draft and width > 1:
            tokens, draft_probs = draw_draft(self.draft_head.spread(logits[: width - 1]), self.text.text, sampler)
        block[0, 1:width] = tokens[: width - 1]
        return Proposal(block[:, :width], num_read, draft_probs)

    def _draft(self, block: Int[Tensor, "1 slot"]) -> tuple[Float[Tensor, "draft hidden"], int]:
        """Let the drafter read the unread features and draft a block.

        Returns:
            Last hidden states of the draft slots that may be verified, and the number of tokens read.
        """
        start, size = len(self.text.text) - 1, block.shape[1]
        features = torch.cat([torch.cat(layer, dim=1) for layer in zip(*self.unread, strict=True)], dim=-1)
        self.unread.clear()
        positions = torch.arange(start - features.shape[1], start + size, device=block.device)[None]
        hidden = draft_block(
            self.drafter, self.target, block, features, position_ids=positions, cache=self.drafter_cache
        )
        self.drafter_cache.crop(-size)
        self.num_read = start
        last = min(self.text.remaining + 1, self.drafting.max_width)
        return hidden[0, 1:last], features.shape[1]

    def verify(self, proposal: Proposal) -> tuple[int, list[int]]:
        """Let the target verify the proposal.

        Returns:
            The number of accepted draft tokens, and these tokens followed by the target's next one.
        """
        block, width, text = proposal.block, proposal.width, self.text
        if self.target.cache_ability == "rewind":
            self.mark = mark_states(self.cache)
        logits = self.target.logits(self.target.hidden(block, cache=self.cache)[0])
        if proposal.draft_probs is not None:
            draft = block[0, 1:].tolist()
            target_probs = text.sampler.probs(text.sampler.scores(logits, text.text + draft))
            accepted, next_token = verify_sampled(draft, proposal.draft_probs, target_probs, text.sampler)
            return accepted, [*draft[:accepted], next_token]
        drawn = text.draw(logits, block[0, 1:].tolist() if text.sampler.processors else ())
        both = torch.cat([block[0, 1:], drawn]) if width > 1 else drawn
        both = both.tolist()  # one wait for the device, beside the pace's
        draft, drawn = both[: width - 1], both[width - 1 :]
        accepted = verify_draft(draft, drawn)
        return accepted, drawn[: accepted + 1]

    def emit(self, plan: Plan, proposal: Proposal, accepted: int, token_ids: Sequence[int], started: float) -> Step:
        """Append the accepted tokens, update the pace, and drop the rejected ones from the target's cache."""
        emitted, accepted = self.text.take(accepted, token_ids)
        if self.drafting.pace is not None:
            seconds = time.perf_counter() - started  # of the whole step: reading the tokens waited for the device
            self._learn(self.drafting.pace, plan, proposal, accepted, emitted, seconds)
        self.unread.append([layer[:, : len(emitted)] for layer in self.captured])
        self._take_back(proposal, len(emitted))
        return Step(emitted, accepted, proposal.width, accepted if plan.copied and not plan.is_drafted else 0)

    def _take_back(self, proposal: Proposal, num_kept: int) -> None:
        """Keep the first tokens of the proposal in the target's cache; recurrent layers read them again."""
        num_rejected = proposal.width - num_kept
        if self.mark and num_rejected:
            rewind(self.cache, self.mark, proposal.width)
            self.target.hidden(proposal.block[:, :num_kept], cache=self.cache)
            num_rejected = 0
        go_back(self.cache, num_rejected)

    def _learn(
        self, pace: Pace, plan: Plan, proposal: Proposal, accepted: int, emitted: list[int], seconds: float
    ) -> None:
        """Tell the pace the step's accepted tokens and seconds."""
        if plan.is_drafted:
            is_usual = proposal.num_read < self.text.num_prompt  # otherwise the drafter also read the prompt
            pace.record(proposal.width, accepted, seconds if is_usual else None, self.lookup.read())
        else:
            pace.record_plain(seconds, proposal.width)
        pace.learn_copying(plan.match, plan.copied, emitted)


@torch.inference_mode()
def speculative_steps(target: Target, drafter: Drafter, text: Continuation, drafting: Drafting) -> Iterator[Step]:
    """Yield the tokens that each forward pass of the target emits, for `generate` and `stream`."""
    with target.capture(drafter.target_layer_ids) as captured:
        yield from Speculation(target, drafter, text, drafting, captured).steps()


@torch.inference_mode()
def plain_steps(target: Target, text: Continuation) -> Iterator[Step]:
    """Yield one token a step, decoded by the target alone."""
    cache = make_cache(target.config, len(text.text) + text.max_new_tokens)
    inputs, width = torch.tensor([text.text], device=target.device), 0
    while not text.is_done:
        inputs = text.draw(target.logits(target.hidden(inputs, cache=cache)[0, -1:]))[None]
        token_ids, _ = text.take(0, inputs[0].tolist())
        yield Step(token_ids, 0, width)
        width = 1


def generate_plain(
    target: Target, token_ids: Sequence[int] | Int[Tensor, "..."], **options: Unpack[SamplingOptions]
) -> Generation:
    """Decode one token at a time with the target alone, as the baseline.

    Arguments as in `generate`.
    """
    return collect(plain_steps(target, make_continuation(target, token_ids, **options)), 1, target.device)


def generate(
    target: Target,
    drafter: Drafter,
    token_ids: Sequence[int] | Int[Tensor, "..."],
    *,
    width: Width = "auto",
    block_size: int | None = None,
    verify_rule: VerifyRule = "equality",
    paces: Paces | None = None,
    **options: Unpack[SamplingOptions],
) -> Generation:
    """Decode with a drafter, which gives the target's own text in fewer forward passes of the target.

    A step drafts a block after the last token. With width `auto` it sometimes copies the tokens that followed the last
    ones before (`PromptLookup`) instead. The target reads the last token and the proposed ones, accepts a beginning of
    them, and adds its own next token.

    Memory: keys and values of prompt, response and block in target and drafter; logits of one block; on a CPU a second
    copy of the LM head.

    Args:
        target: the model whose text is kept.
        drafter: trained for this target.
        token_ids: the prompt, one row.
        width: the verification length. `full` verifies the whole block; a number from 2 to `block_size` verifies that
            number of tokens, the last one included; `auto` chooses the fastest length at each step, after it has
            measured this machine for about a second.
        block_size: number of slots to draft, the anchor included; by default, and at most, the size used in training.
        verify_rule: `equality` drafts greedily and accepts tokens that equal the target's own draw; `speculative` draws
            the draft and accepts by speculative sampling. Both are the same at temperature 0.
        paces: measurements and experience of earlier calls with width `auto`; without it each call measures the machine
            again.
        options: see `SamplingOptions`. With the rule `equality` a `seed` gives the same text as in `generate_plain`, up
            to rounding.

    Returns:
        See `Generation`.

    Raises:
        ValueError: an empty or over-long prompt, an option outside its range, or a drafter for another target.

    Source: DFlash (arXiv 2602.06036), `dflash_generate` of z-lab/dflash.
    """
    text = make_continuation(target, token_ids, **options)
    chosen = {"width": width, "block_size": block_size, "verify_rule": verify_rule, "paces": paces}
    drafting = make_drafting(target, drafter, text.sampler.temperature, **chosen)
    return collect(speculative_steps(target, drafter, text, drafting), drafting.block_size, target.device)
