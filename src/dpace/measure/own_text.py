"""Check that a text is the target's own, and tell ties within rounding from bugs.

What comparisons rest on is checked here: plain decoding is transformers' `generate`, and kept responses are the
target's greedy text. Where a text differs, a `Divergence` has the target's margin there and the size of rounding.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpace.batches.dataset import ResponseDataset
from dpace.decode.sampling import Sampler
from dpace.fast.cache import TextCache
from dpace.fast.top import argmax
from dpace.respond.in_process import run_transformers
from dpace.respond.responses import Response, read_meta, read_responses
from dpace.system.groups import spread_evenly
from dpace.system.ledger import JsonObject
from dpace.system.progress import count
from dpace.system.provenance import same_run
from dpace.target import Target, answer_end
from dpace.target.chat import tokenizer_hashes

NUM_REREAD = 8
"""Responses of a file that are read again."""
NUM_SHARED = 32
"""Conversations of a data set that `greedy_share` reads."""
READ_ROWS = 128
"""Tokens whose logits exist at once where answers are read."""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    cases: str
    """What was examined, in words."""
    is_passed: bool
    detail: str


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


def read_greedy(path: str | Path) -> tuple[list[Response], JsonObject]:
    """Read a file of responses that can be read again, and what made it.

    Raises:
        ValueError: it cannot be read, is empty, or has other answers than greedy ones of the target.
    """
    responses = read_responses(path)
    meta = read_meta(path)
    if not responses or "max_new_tokens" not in meta:
        raise ValueError(
            f"{path} has no response, or no meta file beside it; name a file that `dpace respond` wrote with "
            "--responses"
        )
    source = meta.get("source")
    temperature = meta.get("temperature")
    if temperature != 0 or source == "own":
        raise ValueError(
            f"{path} has source {source} and temperature {temperature}, and only the target's greedy answers can be "
            "read again; leave --responses out"
        )
    return responses, meta


def check_responses(target: Target, responses: Sequence[Response], meta: JsonObject) -> Finding:
    """Read a sample of greedy answers again.

    Every token must be the most likely one after the text before it, and an answer must end at a stop token or where it
    was cut.

    Args:
        target: loaded in the precision that the answers were written in.
        responses: of which some are read, evenly chosen.
        meta: what made them, as `dpace.respond.responses.read_meta` reads it.

    Raises:
        ValueError: another target answered, or with another tokenizer or chat template.
    """
    now = {}
    if meta.get("source") != "servers":  # which do not tell the hash of their weights
        now["target_sha256"] = target.sha256
    now |= tokenizer_hashes(target)
    same_run(meta, now, "the answers were made", "name the target that answered, or leave --responses out")
    chosen = spread_evenly(responses, NUM_REREAD)
    divergences = []
    num_answers = 0
    for response in chosen:
        for number, span in enumerate(response.response_spans, start=1):
            where = f"{response.id}, answer {number}"
            divergence = _reread(target, response, span, where, meta["max_new_tokens"])
            if divergence is not None:
                divergences.append(divergence)
            num_answers += 1
    name = "responses are the target's greedy text"
    return text_finding(name, count(len(chosen), "response"), num_answers, divergences)


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
        hidden = target.hidden(token_ids[None])[0, :-1]
        is_greedy.append(_best_tokens(target, hidden[is_answer]) == token_ids[1:][is_answer])
    return float(torch.cat(is_greedy).float().mean())


def _best_tokens(target: Target, hidden: Float[Tensor, "row hidden"]) -> Int[Tensor, " row"]:
    """Find the target's most likely tokens."""
    return torch.cat([argmax(target.head.logits(rows).float()) for rows in hidden.split(READ_ROWS)])


@torch.inference_mode()
def _reread(
    target: Target, response: Response, span: Sequence[int], where: str, max_new_tokens: int
) -> Divergence | None:
    """Return the first token of an answer that the target would not have written; without one, the last tie."""
    prompt = response.token_ids[: span[0]]
    answer = response.token_ids[slice(*span)]
    text = torch.tensor([prompt + answer], device=target.device)
    best = _best_tokens(target, target.hidden(text)[0, len(prompt) - 1 :]).tolist()
    # One token more than the answer has: it tells an answer that was cut too early.
    expected = best[: answer_end(answer, target.stop_token_ids) or max_new_tokens]
    divergence = None
    for place, (token, best_token) in enumerate(itertools.zip_longest(answer, expected)):
        if token == best_token:
            continue
        other = answer[:place] + expected[place : place + 1]
        divergence = find_divergence(target, where, prompt, answer, other)
        # After a tie the answer may be right again: what follows was read after the answer's own token.
        if not divergence.is_tie:
            break
    return divergence


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
    at_once = target.head.logits(target.hidden(text)[0, len(prompt) - 1 :]).float()  # (seq, vocab)
    cache = TextCache(target.config, text.shape[1])
    one_by_one = []
    for start, end in itertools.pairwise([0, *range(len(prompt), text.shape[1] + 1)]):
        hidden = target.hidden(text[:, start:end], cache=cache)
        one_by_one.append(target.head.logits(hidden[0, -1:]).float())
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


def text_finding(name: str, cases: str, total: int, divergences: Sequence[Divergence]) -> Finding:
    """Make the finding of a check of texts, which passes where every difference is a tie."""
    lines = [f"{total - len(divergences)} of {total} texts equal"]
    lines += [divergence.line for divergence in divergences]
    return Finding(name, cases, all(divergence.is_tie for divergence in divergences), "\n".join(lines))
