"""Find where a text differs from the target's own, and tell ties within rounding from bugs."""

import itertools
import math
from dataclasses import dataclass

import torch

from dpace.decode.sampling import Sampler
from dpace.fast.cache import make_cache
from dpace.target import Target


@dataclass(frozen=True)
class Divergence:
    """The first place where a text differs from the target's own."""

    prompt_id: str
    how: str
    """Way of decoding, in words."""
    position: int
    """Number of the token in the response, from 0."""
    token_ids: tuple[int | None, int | None]
    """Token found and token expected; None where the text had ended."""
    margin: float
    """How much the target prefers the expected token, as a difference of logits.

    Above temperature 0, the logits include the noise of sampling."""
    noise: float
    """Size of rounding here: the largest difference between logits of this text read at once and token by token."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone can have caused it: both logits may be off by the noise."""
        return self.margin <= 2 * self.noise


@torch.inference_mode()
def find_divergence(target: Target, sampler: Sampler, where: tuple[str, str], prompt, found, expected) -> Divergence:
    """Measure how close the target was to choosing the other token."""
    pairs = itertools.zip_longest(found, expected)
    position, tokens = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    num_prompt = len(prompt)
    text = torch.tensor([[*prompt, *expected]], device=target.device)[:, : num_prompt + position]
    at_once = target.head.logits(target.hidden(text)[0, num_prompt - 1 :]).float()
    cache, one_by_one = make_cache(target.config, text.shape[1]), []
    for start, end in [(0, num_prompt), *((i, i + 1) for i in range(num_prompt, num_prompt + position))]:
        hidden = target.hidden(text[:, start:end], cache=cache)
        one_by_one.append(target.head.logits(hidden[0, -1:]).float())
    noise = float((at_once - torch.cat(one_by_one)).abs().max())
    if None in tokens:
        return Divergence(*where, position, tokens, math.inf, noise)
    scores = at_once
    if sampler.temperature:
        scores = sampler.probs(at_once).log() - torch.stack(sampler.noise(0, at_once)).log()
    return Divergence(*where, position, tokens, float(scores[-1, tokens[1]] - scores[-1, tokens[0]]), noise)


def describe(target: Target, divergence: Divergence) -> str:
    """Write a divergence in one line."""
    words = [
        "the end" if token is None else repr(target.tokenizer.decode([token])) if target.tokenizer else str(token)
        for token in divergence.token_ids
    ]
    kind = "tie" if divergence.is_tie else "NOT A TIE"
    return (
        f"{divergence.prompt_id}, {divergence.how}, token {divergence.position}: {words[0]}, expected {words[1]}, "
        f"margin {divergence.margin:.2g}, rounding {divergence.noise:.2g}: {kind}"
    )
