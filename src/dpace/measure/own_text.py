"""Check what comparisons rest on: the baseline and kept responses are the target's greedy text."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dpace.data.chat import tokenizer_hashes
from dpace.data.prompts import Prompt
from dpace.data.responses import Response, read_meta, read_responses
from dpace.decode import generate_plain
from dpace.decode.sampling import Sampler
from dpace.measure.divergence import Divergence, describe, find_divergence
from dpace.measure.parity import Finding
from dpace.target import Target

NUM_REREAD = 8
"""Responses of a file that are read again."""
MAX_LISTED = 5
"""Differences that a finding lists."""


@torch.inference_mode()
def check_plain(
    target: Target, prompts: Sequence[Prompt], encoded: Sequence[list[int]], max_new_tokens: int
) -> Finding:
    """Compare the baseline with `generate` of transformers, greedy, without the generation config."""
    different = []
    sampler, stops = Sampler(device=target.device), target.stop_token_ids
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        found = generate_plain(target, token_ids, max_new_tokens=max_new_tokens).token_ids
        expected = _generate(target, token_ids, stops, max_new_tokens)
        if found != expected:
            where = prompt.id, "plain decoding"
            different.append(find_divergence(target, sampler, where, token_ids, found, expected))
    detail = f"{len(prompts) - len(different)} of {len(prompts)} texts equal"
    detail += "".join(f"\n{describe(target, divergence)}" for divergence in different[:MAX_LISTED])
    is_passed = all(divergence.is_tie for divergence in different)
    return Finding("plain decoding is generate of transformers", f"{len(prompts)} prompts", is_passed, detail)


def _generate(target: Target, token_ids: list[int], stops: Sequence[int], max_new_tokens: int) -> list[int]:
    """Continue a prompt with transformers' own loop."""
    input_ids = torch.tensor([token_ids], device=target.device)
    own, target.model.generation_config = target.model.generation_config, GenerationConfig()
    try:
        out = target.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=next(iter(stops), 0),
            eos_token_id=list(stops) or None,
            disable_compile=True,
        )
    finally:
        target.model.generation_config = own
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
        meta: what made them, see `dpace.data.responses.read_meta`.

    Returns:
        Whether the target is the one that answered, and whether the text is its own.
    """
    now = {"target_sha256": target.sha256, **tokenizer_hashes(target)}
    if meta.get("source") == "servers":
        now.pop("target_sha256")
    other = [key.removesuffix("_sha256") for key in now if meta.get(key) != now[key]]
    detail = ", ".join(now).replace("_sha256", "")
    if other:
        detail = f"another {', '.join(other)} than {meta.get('target')} had"
    same = Finding("responses are of this target", "hashes", not other, detail)
    chosen = random.Random(0).sample(list(responses), min(NUM_REREAD, len(responses)))
    wrong, num_tokens = [], 0
    for response in chosen:
        for number, (start, end) in enumerate(response.response_spans, start=1):
            num_tokens += end - start
            wrong += _reread(target, response, (start, end), f"answer {number}", meta["max_new_tokens"])
    detail = f"{num_tokens - len(wrong)} of {num_tokens} tokens are the most likely ones"
    detail += "".join(f"\n{describe(target, divergence)}" for divergence in wrong[:MAX_LISTED])
    is_passed = all(divergence.is_tie for divergence in wrong)
    return [same, Finding("responses are the target's greedy text", f"{len(chosen)} responses", is_passed, detail)]


@torch.inference_mode()
def _reread(target: Target, response: Response, span: tuple[int, int], how: str, limit: int) -> list[Divergence]:
    """List the tokens of an answer that the target would not have written."""
    (start, end), where = span, (response.id, how)
    vocabulary, stops = target.head.weight.shape[0], set(target.stop_token_ids)
    # An answer needs a text before it, and tokens of this target.
    if start == 0 or max(response.token_ids[:end], default=0) >= vocabulary:
        token = max(response.token_ids[:end], default=0)
        return [Divergence(*where, 0, (token, None), math.inf, 0.0)]
    found = response.token_ids[start:end]
    text = torch.tensor([response.token_ids[: max(end - 1, start)]], device=target.device)
    logits = target.head.logits(target.hidden(text)[0, start - 1 :]).float()
    best = logits.argmax(-1).tolist()[: len(found)]
    places = [i for i, (token, own) in enumerate(zip(found, best, strict=True)) if token != own]
    noise = 0.0
    if places:  # that of the whole answer, up to the last difference
        sampler, last = Sampler(device=target.device), places[-1]
        prompt, expected = response.token_ids[:start], [*found[:last], best[last]]
        noise = find_divergence(target, sampler, where, prompt, found, expected).noise
    wrong = [
        Divergence(*where, i, (found[i], best[i]), float(logits[i, best[i]] - logits[i, found[i]]), noise)
        for i in places
    ]
    early = next((i + 1 for i, token in enumerate(found) if token in stops), None)
    if early is not None and early < len(found):
        wrong.append(Divergence(*where, early, (found[early], None), math.inf, noise))
    if early is None and len(found) != limit:
        wrong.append(Divergence(*where, len(found), (None, best[-1] if best else 0), math.inf, noise))
    return wrong
