"""Sampling from the target's logits, and the two rules that verify drafts."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpace.fast.top import argmax

LEAST_TEMPERATURE = 1e-30
"""Smaller ones count as this one, with which scores are still finite in fp32; both draw the most likely token."""


class Sampler:
    """A sampler of tokens from logits, with the filters of `model.generate` in the same order.

    Each position of the response has random numbers of its own. So a seed gives the same text with and without a
    drafter, for any number of tokens verified at once, up to rounding.

    Memory: random numbers of the positions in one verification, "slot vocab" in fp32.

    Args:
        temperature: 0 is greedy, and the filters then change nothing.
        top_k: keep this number of most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this probability.
        min_p: keep tokens with at least this share of the highest probability.
        processors: further transformers processors, which see the tokens before the one that is drawn.
        seed: seed of the draws; by default torch's global generator is used.
        device: device of the logits.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        processors: LogitsProcessorList | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.temperature = temperature
        self.processors: Any = processors or LogitsProcessorList()
        self.filters: Any = LogitsProcessorList()
        if temperature:
            # In the order of `model.generate`: each filter sees the scores that the one before has left.
            if temperature != 1:
                self.filters.append(TemperatureLogitsWarper(max(float(temperature), LEAST_TEMPERATURE)))
            if top_k > 0:
                self.filters.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                self.filters.append(TopPLogitsWarper(top_p))
            if min_p > 0:
                self.filters.append(MinPLogitsWarper(min_p))
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(seed)
        self._noise_rows: list[Tensor] = []
        self._noise_position = 0

    def scores(self, logits: Float[Tensor, "slot vocab"], prefix: Sequence[int] = ()) -> Float[Tensor, "slot vocab"]:
        """Apply all processors and filters; row `k` follows `prefix[: len(prefix) - rows + 1 + k]`.

        `prefix` may be left out where there are no processors, because only these look at the text.
        The scores are in fp32, in which `argmax` is several times faster than in bf16.
        """
        if self.processors:
            rows = []
            # The last row follows the whole prefix, and each row before it one token less.
            for num_tokens, row in enumerate(logits.float(), start=len(prefix) - len(logits) + 1):
                ids = torch.tensor([prefix[:num_tokens]], device=logits.device)
                rows.append(self.processors(ids, row[None]))
            logits = torch.cat(rows)
        return self.filters(None, logits.float())

    def probs(self, scores: Float[Tensor, "slot vocab"]) -> Float[Tensor, "slot vocab"]:
        """Compute the distribution of each row; at temperature 0 all probability is on the most likely token."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(argmax(scores), scores.shape[-1]).float()
        return torch.softmax(scores, dim=-1)

    def draw(self, scores: Float[Tensor, "slot vocab"], position: int) -> Int[Tensor, " slot"]:
        """Draw one token a row from `scores`; the most likely one at temperature 0.

        Row `k` is for the response's token `position + k`; later calls must not ask for positions before `position`.
        The token with the largest `p / e` is drawn, where `e` are standard exponential numbers: it is token `x` with
        probability `p[x]`.
        """
        if self.temperature == 0:
            return argmax(scores)
        probs = self.probs(scores)
        for row, noise in zip(probs, self.noise(position, probs), strict=True):
            row.div_(noise)  # in place, because allocating several megabytes is slow
        return argmax(probs)

    def noise(self, position: int, rows: Float[Tensor, "slot vocab"]) -> list[Float[Tensor, " vocab"]]:
        """Return the random numbers of the response's tokens from `position` on, one row for each of `rows`.

        They are drawn a row at a time, so that they do not depend on the number of rows.
        """
        # Rows of rejected slots are kept: the next call asks for their positions again.
        self._noise_rows = self._noise_rows[position - self._noise_position :]
        self._noise_position = position
        while len(self._noise_rows) < len(rows):
            row = torch.empty(rows.shape[1], device=rows.device)
            self._noise_rows.append(row.exponential_(generator=self.generator))
        return self._noise_rows[: len(rows)]


def verify_draft(draft_tokens: Sequence[int], target_tokens: Sequence[int]) -> int:
    """Count the draft tokens that equal the target's own choice, up to the first that differs.

    `target_tokens[k]` is a draw from the target's distribution after the first `k` draft tokens. Every emitted token is
    such a draw, so for any drafter the output has the target's distribution, and at temperature 0 it is the target's
    own text.

    Source: `dflash_generate` of z-lab/dflash.
    """
    accepted = 0
    while accepted < len(draft_tokens) and draft_tokens[accepted] == target_tokens[accepted]:
        accepted += 1
    return accepted


def verify_sampled(
    draft_tokens: Sequence[int],
    draft_probs: Float[Tensor, "draft vocab"],
    target_probs: Float[Tensor, "slot vocab"],
    sampler: Sampler,
) -> tuple[int, int]:
    """Verify a draft by speculative sampling.

    Draft token `x` is accepted with probability `min(1, p(x) / q(x))`, so a slot is accepted with probability
    `sum of min(p, q)`. The first rejected token is replaced by a draw from `max(p - q, 0)`, normalized; after a draft
    that is accepted whole, the next token is drawn from `p`.

    The output has the target's distribution. This holds only if the draft tokens are draws from `draft_probs`, and
    their number does not depend on which tokens were drawn.

    Returns:
        The number of accepted draft tokens, and the next token.

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1.
    """
    device = target_probs.device
    slots = torch.arange(len(draft_tokens), device=device)
    tokens = torch.tensor(draft_tokens, device=device, dtype=torch.long)
    acceptance_probs = target_probs[slots, tokens] / draft_probs[slots, tokens]
    drawn = torch.rand(len(tokens), generator=sampler.generator, device=device)
    # The product is 1 up to the first rejected token, and 0 from there on.
    accepted = int((drawn < acceptance_probs).cumprod(0).sum())
    # The row after the accepted tokens: it is for the rejected token, or for the one after the whole draft.
    next_probs = target_probs[accepted]
    if accepted < len(draft_tokens):
        excess = (next_probs - draft_probs[accepted]).clamp_min(0)
        # Nothing is left where both distributions are equal, and rounding alone rejected the token.
        next_probs = torch.where(excess.any(), excess, next_probs)
    return accepted, int(torch.multinomial(next_probs, 1, generator=sampler.generator))
