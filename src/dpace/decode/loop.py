"""Draft, verify, accept, emit: speculative decoding that keeps the target's text, and plain decoding beside it."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dpace.decode.generation import Generation, Step, collect
from dpace.decode.lookup import PromptLookup
from dpace.decode.pace import Pace, make_pace
from dpace.decode.request import VerifyRule, Width, first_stop, prepare
from dpace.decode.sampling import Sampler, verify_draft, verify_sampled
from dpace.drafter import Drafter
from dpace.fast.cache import go_back, make_cache
from dpace.target import Target


@torch.inference_mode()
def _plain_steps(target: Target, prompt: Tensor, sampler: Sampler, max_new_tokens: int, stops: set[int]):
    """One token a step."""
    cache = make_cache(target.config, prompt.shape[1] + max_new_tokens)
    text, inputs = prompt[0].tolist(), prompt
    for count in range(1, max_new_tokens + 1):
        logits = target.logits(target.hidden(inputs, cache=cache)[0, -1:])
        inputs = sampler.draw(sampler.scores(logits, text), count - 1)[None]
        text.append(int(inputs))
        yield Step(text[-1:], 0, int(count > 1))
        if text[-1] in stops:
            return


def generate_plain(
    target: Target,
    token_ids: Sequence[int] | Int[Tensor, " seq"],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | None = None,
) -> Generation:
    """Decode one token at a time with the target alone: the baseline. Arguments as in `generate`."""
    prompt, stops = prepare(target, token_ids, max_new_tokens, stop_token_ids)
    sampler = Sampler(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, device=target.device)
    return collect(_plain_steps(target, prompt, sampler, max_new_tokens, stops), 1, target.device)


@torch.inference_mode()
def speculative_steps(
    target: Target,
    drafter: Drafter,
    prompt: Int[Tensor, "1 seq"],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    stops: set[int],
    pace: Pace | None,
    block_size: int,
    max_width: int | None = None,
    verify_rule: VerifyRule = "equality",
) -> Iterator[Step]:
    """Yield what each forward pass of the target emits; the loop behind `generate` and `stream`.

    A step drafts a block after the last token, or with `pace` sometimes takes what followed these tokens before (`PromptLookup`), has
    the target read the last token and as much of the draft as `pace` wants (for None all of it, up to `max_width` tokens), accepts a beginning of the draft, and emits it with the target's next token. Both caches then hold exactly
    the tokens before the last one.
    """
    device = target.device
    capacity = prompt.shape[1] + max_new_tokens + block_size
    cache, drafter_cache = make_cache(target.config, capacity), make_cache(drafter.config, capacity)
    masks = torch.full((1, block_size - 1), drafter.mask_token_id, device=device)
    text, num_prompt = prompt[0].tolist(), prompt.shape[1]
    lookup, num_read = PromptLookup(text), 0
    samples_draft = verify_rule == "speculative" and sampler.temperature > 0
    with target.capture(drafter.target_layer_ids) as captured:
        hidden = target.hidden(prompt, cache=cache)
        unread = [captured[:]]  # features, by layer, of the tokens that the drafter has not read
        text.append(int(sampler.draw(sampler.scores(target.logits(hidden[0, -1:]), text), 0)))
        yield Step(text[-1:], 0, 0)
        while len(text) - num_prompt < max_new_tokens and text[-1] not in stops:
            started = time.perf_counter()
            remaining = max_new_tokens - (len(text) - num_prompt)
            width, is_drafted, match, copied, draft, draft_probs = 1, True, 0, [], [], None
            if pace is not None:
                match, copied = lookup.propose(min(block_size, remaining) - 1)
                width, is_drafted = pace.plan(match, len(copied), len(text) - 1 - num_read)
            block = torch.tensor([text[-1:] + copied[: width - 1]], device=device)
            if is_drafted:
                block, start = torch.cat([block, masks], dim=1), len(text) - 1
                num_read = start
                features = torch.cat([torch.cat(of_layer, dim=1) for of_layer in zip(*unread, strict=True)], dim=-1)
                unread.clear()
                hidden = drafter(
                    noise_embeds=target.embed(block),
                    context_hidden_states=features,
                    position_ids=torch.arange(start - features.shape[1], start + block_size, device=device)[None],
                    cache=drafter_cache,
                ).last_hidden_state
                drafter_cache.crop(-block_size)
                logits = target.logits(hidden[0, 1 : min(remaining + 1, max_width or block_size)])
                tokens, width = logits.float().argmax(-1), len(logits) + 1
                if pace is not None:
                    width = pace.width(drafter.confidences(logits))
                if samples_draft:
                    draft_probs = sampler.probs(sampler.scores(logits[: width - 1], text + tokens.tolist()))
                    tokens = torch.multinomial(draft_probs, 1, generator=sampler.generator)[:, 0]
                block[0, 1:width] = tokens[: width - 1]
            hidden = target.hidden(block[:, :width], cache=cache)
            if draft_probs is not None or sampler.processors:
                draft = block[0, 1:width].tolist()
            scores = sampler.scores(target.logits(hidden[0]), text + draft)
            if draft_probs is not None:
                accepted, next_token = verify_sampled(draft, draft_probs, sampler.probs(scores), sampler)
                emitted = [*draft[:accepted], next_token][:remaining]
            else:
                drawn = sampler.draw(scores, len(text) - num_prompt)
                both = torch.cat([block[0, 1:width], drawn]) if width > 1 else drawn
                both = both.tolist()  # what waits for the device, apart from `pace`
                draft, drawn = both[: width - 1], both[width - 1 :]
                accepted = verify_draft(draft, drawn)
                emitted = drawn[: min(accepted + 1, remaining)]
            stop = first_stop(emitted, stops)
            if stop is not None:
                emitted, accepted = emitted[: stop + 1], min(accepted, stop + 1)
            text += emitted
            if pace is not None:
                seconds = time.perf_counter() - started  # of all of it: the tokens had to wait for the device
                if is_drafted:
                    is_usual = features.shape[1] < num_prompt  # else the drafter also read the prompt
                    pace.record(width, accepted, seconds if is_usual else None, lookup.read())
                else:
                    pace.record_plain(seconds, width)
                pace.learn_copying(match, copied, emitted)
            unread.append([layer[:, : len(emitted)] for layer in captured])
            go_back(cache, width - len(emitted))
            yield Step(emitted, accepted, width, accepted if copied and not is_drafted else 0)


def step_sizes(
    target: Target, drafter: Drafter, width: Width, temperature: float, block_size: int | None = None
) -> dict[str, Any]:
    """What `width`, `temperature` and `block_size` of `generate` are to `speculative_steps`.

    Raises:
        ValueError: more tokens than a block has, or fewer than 2.
    """
    block_size = block_size or drafter.block_size
    if not 2 <= block_size <= drafter.block_size:
        raise ValueError(f"block_size is {block_size}; this drafter drafts blocks of 2 to {drafter.block_size}")
    max_width = width if isinstance(width, int) else block_size
    if not 2 <= max_width <= block_size:
        raise ValueError(f"width is {width}; a block of {block_size} has 2 to {block_size} tokens to verify")
    pace = make_pace(target, drafter, temperature) if width == "auto" else None
    return {"pace": pace, "block_size": block_size, "max_width": max_width}


def generate(
    target: Target,
    drafter: Drafter,
    token_ids: Sequence[int] | Int[Tensor, " seq"],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | None = None,
    width: Width = "auto",
    block_size: int | None = None,
    verify_rule: VerifyRule = "equality",
) -> Generation:
    """Decode with a drafter: the target's text, in fewer of its forward passes.

    See `speculative_steps`. Memory: keys and values of prompt, response and block in target and drafter; logits of one block;
    on a CPU a second copy of the LM head.

    Args:
        target: the model whose text is kept.
        drafter: trained for it.
        token_ids: the prompt, one row.
        max_new_tokens: upper limit; reached exactly unless a stop token comes first.
        temperature: of the target's distribution; 0 is greedy.
        top_k: see `Sampler`, as `top_p` and `min_p`.
        top_p: see `Sampler`.
        min_p: see `Sampler`.
        stop_token_ids: end the response, and are its last token; by default the target's own.
        seed: of the draws; by default torch's global generator. With the rule `equality` a seed gives the text that it gives
            `generate_plain`, up to rounding.
        width: `full` verifies the whole block, a number (2 to `block_size`) so many tokens with the last one, `auto` what `Pace`
            finds worth it, of a draft or of what followed the last tokens before (`PromptLookup`); it measures the machine for about a
            second before the first response.
        block_size: slots to draft, the anchor included; by default, and at most, what the drafter was trained with.
        verify_rule: `equality` drafts greedily and accepts what equals the target's own draw; `speculative` draws the draft
            and accepts by speculative sampling. The same thing at temperature 0.

    Returns:
        See `Generation`.

    Raises:
        ValueError: empty or over-long prompt, bad limits, or a drafter for another target.

    Source: DFlash (arXiv 2602.06036), `dflash_generate` of z-lab/dflash.
    """
    drafter.check_target(target)
    prompt, stops = prepare(target, token_ids, max_new_tokens, stop_token_ids)
    sampler = Sampler(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, device=target.device)
    sizes = step_sizes(target, drafter, width, temperature, block_size)
    steps = speculative_steps(
        target,
        drafter,
        prompt,
        sampler,
        max_new_tokens=max_new_tokens,
        stops=stops,
        verify_rule=verify_rule,
        **sizes,
    )
    return collect(steps, sizes["block_size"], target.device)
