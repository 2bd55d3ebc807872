"""Tell how near a text is to the target's own: ties within rounding from bugs, and the share of its greedy tokens.

The text that others are compared with is checked itself: plain decoding is transformers' `generate`. Where a text
differs, a `Divergence` has the target's margin there and the size of rounding.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.decode.sampling import Sampler
from dpace.fast.cache import TextCache
from dpace.fast.top import argmax
from dpace.respond.in_process import run_transformers
from dpace.system.groups import spread_evenly
from dpace.target import Target

NUM_SHARED = 32
"""Conversations of a data set that `greedy_share` reads."""
READ_ROWS = 128
"""Tokens whose logits exist at once where answers are read."""


class Divergence(NamedTuple):
    """The first place where a text differs from the target's own."""

    is_tie: bool
    """Whether rounding alone can have caused it."""
    line: str
    """Where it is, the token found and the token expected, and how much the target prefers the expected one."""


@torch.inference_mode()
def generate_transformers(target: Target, token_ids: list[int], max_new_tokens: int) -> list[int]:
    """Continue a prompt greedily with transformers' own loop."""
    input_ids = torch.tensor([token_ids], device=target.device)
    out = run_transformers(target, input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=max_new_tokens)
    return out[0, len(token_ids) :].tolist()


@torch.inference_mode()
def greedy_share(target: Target, dataset: ResponseDataset) -> float:
    """Return which share of the answers' tokens are the target's most likely ones, in some of them.

    Memory: logits of `READ_ROWS` tokens.
    """
    is_greedy = []
    for index in spread_evenly(range(len(dataset)), NUM_SHARED):
        token_ids = dataset.token_ids(index).to(target.device)
        # The row of the token before predicts a token; nothing predicts the first one.
        is_answer = dataset.is_response(index)[1:].to(target.device)
        hidden = target.hidden(token_ids[None])[0, :-1][is_answer]
        best = torch.cat([argmax(target.logits(rows).float()) for rows in hidden.split(READ_ROWS)])
        is_greedy.append(best == token_ids[1:][is_answer])
    return float(torch.cat(is_greedy).float().mean())


@torch.inference_mode()
def find_divergence(
    target: Target,
    where: str,
    prompt: Sequence[int],
    found: Sequence[int],
    expected: Sequence[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Divergence:
    """Find where a text leaves the target's own, and measure how close the target was to choosing the other token.

    The margin is a difference of logits; above temperature 0, they include the noise of sampling. The size of rounding
    is the largest difference between logits of this text that is read at once and token by token. So both logits may be
    off by it.

    Args:
        target: reads the text before that place.
        where: the prompt and the way of decoding, in words.
        prompt: token ids before both texts.
        found: token ids of the text.
        expected: token ids of the target's own text, which differ.
        temperature: of both texts.
        seed: of both texts.
    """
    # None stands for the end of the shorter text.
    pairs = enumerate(itertools.zip_longest(found, expected))
    position, tokens = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    text = torch.tensor([[*prompt, *expected[:position]]], device=target.device)
    at_once = target.logits(target.hidden(text)[0, len(prompt) - 1 :]).float()  # (seq, vocab)
    cache = TextCache(target.config, text.shape[1])
    one_by_one = []
    for start, end in itertools.pairwise([0, *range(len(prompt), text.shape[1] + 1)]):
        hidden = target.hidden(text[:, start:end], cache=cache)
        one_by_one.append(target.logits(hidden[0, -1:]).float())
    rounding = float((at_once - torch.cat(one_by_one)).abs().max())
    margin = math.inf
    if None not in tokens:
        scores = at_once
        if temperature:
            sampler = Sampler(temperature, seed=seed, device=target.device)
            # The largest `p / e` is drawn, see `Sampler.draw`: so the largest `log p - log e`.
            scores = sampler.probs(at_once).log() - torch.stack(sampler.noise(0, at_once)).log()
        margin = float(scores[-1, tokens[1]] - scores[-1, tokens[0]])
    is_tie = margin <= 2 * rounding
    words = ["the end" if token is None else repr(target.tokenizer.decode([token])) for token in tokens]
    line = (
        f"{where}, token {position}: {words[0]}, expected {words[1]}, margin {margin:.2g}, rounding {rounding:.2g}: "
        f"{'tie' if is_tie else 'NOT A TIE'}"
    )
    return Divergence(is_tie, line)
