"""Check that a text is the target's own, and tell ties within rounding from bugs.

What comparisons rest on is checked here: plain decoding is transformers' `generate`, and kept responses are the
target's greedy text. Where a text differs, a `Divergence` has the target's margin there and the size of rounding.
"""

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.decode.sampling import Sampler
from dpace.fast.cache import TextCache
from dpace.measure.parity import Finding
from dpace.respond.in_process import run_transformers
from dpace.respond.responses import Response, read_meta, read_responses
from dpace.system.progress import count
from dpace.target import Target, answer_end
from dpace.target.chat import tokenizer_hashes

NUM_REREAD = 8
"""Responses of a file that are read again."""
NUM_SHARED = 32
"""Conversations of a data set that `greedy_share` reads."""
READ_ROWS = 128
"""Tokens whose logits it has at once."""


class Divergence(NamedTuple):
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
def generate_transformers(target: Target, token_ids: list[int], max_new_tokens: int) -> list[int]:
    """Continue a prompt greedily with transformers' own loop."""
    input_ids = torch.tensor([token_ids], device=target.device)
    mask = torch.ones_like(input_ids)
    out = run_transformers(target, input_ids, attention_mask=mask, max_new_tokens=max_new_tokens)
    return out[0, len(token_ids) :].tolist()


def read_greedy(path: str | Path) -> tuple[list[Response], dict[str, Any]]:
    """Read a file of responses that can be read again, and what made it.

    Raises:
        ValueError: it cannot be read, is empty, or its answers were sampled.
    """
    responses, meta = read_responses(path), read_meta(path)
    if not responses:
        raise ValueError(f"{path} has no response; name a file that `dpace respond` wrote with --responses")
    of_weights = () if meta.get("source") == "servers" else ("dtype", "target_sha256")  # servers do not tell these
    if missing := [key for key in ("temperature", "max_new_tokens", *of_weights) if key not in meta]:
        raise ValueError(
            f"the meta file beside {path} does not tell {', '.join(missing)} of its answers; write them again with "
            "`dpace respond`"
        )
    if meta.get("source") == "own":
        raise ValueError(f"{path} has replies that the prompts came with, not the target's; leave --responses out")
    if meta["temperature"]:
        raise ValueError(
            f"{path} was sampled at temperature {meta['temperature']:g}, and only greedy answers can be read again; "
            "leave --responses out"
        )
    return responses, meta


def check_responses(target: Target, responses: Sequence[Response], meta: dict[str, Any]) -> list[Finding]:
    """Read a sample of greedy answers again.

    Every token must be the most likely one after the text before it, and an answer must end at a stop token or where it
    was cut.

    Args:
        target: loaded in the precision that the answers were written in.
        responses: of which a fixed random sample is read.
        meta: what made them, see `dpace.respond.responses.read_meta`.

    Returns:
        Whether the target is the one that answered, and whether the text is its own.
    """
    now = {"target_sha256": target.sha256, **tokenizer_hashes(target)}
    if meta.get("source") == "servers":
        del now["target_sha256"]
    other = ", ".join(key.removesuffix("_sha256") for key in now if meta.get(key) != now[key])
    detail = f"another {other} than {meta.get('target')} had" if other else ", ".join(now).replace("_sha256", "")
    same = Finding("responses are of this target", "hashes", not other, detail)
    chosen = random.Random(0).sample(list(responses), min(NUM_REREAD, len(responses)))
    answers = [
        (response, span, f"answer {number}")
        for response in chosen
        for number, span in enumerate(response.response_spans, start=1)
    ]
    wrong = [found for answer in answers if (found := _reread(target, *answer, meta["max_new_tokens"]))]
    name, cases = "responses are the target's greedy text", count(len(chosen), "response")
    return [same, text_finding(target, name, cases, len(answers), wrong)]


@torch.inference_mode()
def greedy_share(target: Target, dataset: ResponseDataset) -> float:
    """Return which share of the answers' tokens are the target's most likely ones, in a fixed random sample.

    Memory: logits of `READ_ROWS` tokens.
    """
    equal = []
    for index in random.Random(0).sample(range(len(dataset)), min(NUM_SHARED, len(dataset))):
        token_ids = dataset.token_ids(index)[None].to(target.device)
        is_answer = dataset.is_response(index)[1:].to(target.device)
        for rows, labels in zip(
            target.hidden(token_ids)[0, :-1][is_answer].split(READ_ROWS),
            token_ids[0, 1:][is_answer].split(READ_ROWS),
            strict=True,
        ):
            equal.append(target.head.logits(rows).argmax(-1) == labels)
    return float(torch.cat(equal).float().mean())


@torch.inference_mode()
def _reread(
    target: Target, response: Response, span: Sequence[int], how: str, max_new_tokens: int
) -> Divergence | None:
    """Return the first token of an answer that the target would not have written; without one, the last tie."""
    where = response.id, how
    prompt, answer = response.token_ids[: span[0]], response.token_ids[slice(*span)]
    largest = max(prompt + answer, default=0)
    if not prompt or largest >= len(target.head.weight):  # it needs a text before it, and tokens of this target
        return Divergence(*where, 0, (largest, None), math.inf, 0.0)
    text = torch.tensor([prompt + answer], device=target.device)
    best = target.head.logits(target.hidden(text)[0, len(prompt) - 1 :]).float().argmax(-1).tolist()
    own = best[: answer_end(answer, target.stop_token_ids) or max_new_tokens]
    divergence = None
    for place, (found, expected) in enumerate(itertools.zip_longest(answer, own)):
        if found != expected:
            other = answer[:place] + own[place : place + 1]
            divergence = find_divergence(target, Sampler(device=target.device), where, prompt, answer, other)
            if not divergence.is_tie:
                break
    return divergence


@torch.inference_mode()
def find_divergence(target: Target, sampler: Sampler, where: tuple[str, str], prompt, found, expected) -> Divergence:
    """Find where a text leaves the target's own, and measure how close the target was to choosing the other token.

    Args:
        target: reads the text before that place at once, and token by token.
        sampler: a new one, with the temperature and the seed of both texts.
        where: the prompt's id, and the way of decoding in words.
        prompt: token ids before both texts.
        found: token ids of the text.
        expected: those of the target's own, which differ.
    """
    pairs = itertools.zip_longest(found, expected)
    position, tokens = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    num_prompt = len(prompt)
    text = torch.tensor([[*prompt, *expected]], device=target.device)[:, : num_prompt + position]
    at_once = target.head.logits(target.hidden(text)[0, num_prompt - 1 :]).float()
    cache, one_by_one = TextCache(target.config, text.shape[1]), []
    for start, end in itertools.pairwise([0, *range(num_prompt, text.shape[1] + 1)]):
        hidden = target.hidden(text[:, start:end], cache=cache)
        one_by_one.append(target.head.logits(hidden[0, -1:]).float())
    noise = float((at_once - torch.cat(one_by_one)).abs().max())
    if None in tokens:
        return Divergence(*where, position, tokens, math.inf, noise)
    scores = at_once
    if sampler.temperature:
        scores = sampler.probs(at_once).log() - torch.stack(sampler.noise(0, at_once)).log()
    return Divergence(*where, position, tokens, float(scores[-1, tokens[1]] - scores[-1, tokens[0]]), noise)


def text_finding(
    target: Target,
    name: str,
    cases: str,
    total: int,
    divergences: Sequence[Divergence],
) -> Finding:
    """Make the finding of a check of texts, which passes where every difference is a tie."""
    lines = [f"{total - len(divergences)} of {total} texts equal"]
    for divergence in divergences:
        found, expected = (
            "the end" if token is None else repr(target.tokenizer.decode([token])) if target.tokenizer else str(token)
            for token in divergence.token_ids
        )
        lines.append(
            f"{divergence.prompt_id}, {divergence.how}, token {divergence.position}: {found}, expected {expected}, "
            f"margin {divergence.margin:.2g}, rounding {divergence.noise:.2g}: "
            f"{'tie' if divergence.is_tie else 'NOT A TIE'}"
        )
    return Finding(name, cases, all(divergence.is_tie for divergence in divergences), "\n".join(lines))
