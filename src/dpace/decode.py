"""Draft, verify, accept, emit: speculative decoding that keeps the target's text, and plain decoding beside it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from dpace.drafter import Drafter
from dpace.metrics import Acceptance
from dpace.target import Target


@dataclass(frozen=True)
class Generation:
    """A response and what it took."""

    token_ids: list[int]
    """The response without the prompt; ends with the stop token where there was one."""
    accepted_lengths: list[int]
    """Accepted draft tokens of each verification, in order; empty for plain decoding."""
    emitted_lengths: list[int]
    """Tokens emitted by each verification: one more, but not where an accepted token ended the text."""
    block_size: int
    prefill_seconds: float
    """Up to and including the first token."""
    decode_seconds: float
    """All further tokens."""

    @property
    def num_decode_tokens(self) -> int:
        """Tokens after the first."""
        return len(self.token_ids) - 1

    @property
    def acceptance(self) -> Acceptance:
        """Statistics of the verifications."""
        missing = sum(a == e for a, e in zip(self.accepted_lengths, self.emitted_lengths, strict=True))
        return Acceptance.from_lengths(self.accepted_lengths, self.block_size, missing)


def sample_tokens(
    logits: Float[Tensor, "slot vocab"], temperature: float, generator: torch.Generator | None = None
) -> Int[Tensor, " slot"]:
    """Draw one token a row from `softmax(logits / temperature)`; the most likely one at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def verify_draft(draft_tokens: Sequence[int], target_tokens: Sequence[int]) -> int:
    """Count the draft tokens that equal the target's own choice, up to the first that differs.

    `target_tokens[k]` is a draw from the target's distribution after the first `k` draft tokens, so every emitted token is
    one, whatever the drafter proposes: the output has the target's distribution, at temperature 0 its very text.

    Source: `dflash_generate` of z-lab/dflash.
    """
    accepted = 0
    while accepted < len(draft_tokens) and draft_tokens[accepted] == target_tokens[accepted]:
        accepted += 1
    return accepted


def _first_stop(token_ids: Sequence[int], stop_token_ids: set[int]) -> int | None:
    """Index of the first stop token."""
    return next((i for i, token in enumerate(token_ids) if token in stop_token_ids), None)


def _prepare(target: Target, token_ids, max_new_tokens: int, temperature: float, stop_token_ids, seed):
    """Check the request; the prompt as a row, the stop tokens and a generator."""
    prompt = torch.as_tensor(token_ids, device=target.device).reshape(1, -1)
    if not prompt.numel():
        raise ValueError("the prompt is empty; give at least one token")
    limit = getattr(target.config, "max_position_embeddings", None)
    if limit and prompt.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {prompt.shape[1]} tokens and max_new_tokens is {max_new_tokens}; together they pass the target's "
            f"limit of {limit}: shorten the prompt or ask for at most {limit - prompt.shape[1]}"
        )
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}; they must be >= 1 and >= 0"
        )
    stops = set(target.stop_token_ids if stop_token_ids is None else stop_token_ids)
    generator = None if seed is None else torch.Generator(target.device).manual_seed(seed)
    return prompt, stops, generator


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate_plain(
    target: Target,
    token_ids: Sequence[int] | Int[Tensor, " seq"],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | None = None,
) -> Generation:
    """Decode one token at a time with the target alone: the baseline. Arguments as in `generate`."""
    prompt, stops, generator = _prepare(target, token_ids, max_new_tokens, temperature, stop_token_ids, seed)
    started = _clock(target.device)
    cache = DynamicCache(config=target.config)
    inputs, response, first_seconds = prompt, [], 0.0
    while True:
        logits = target.model(inputs, cache=cache, logits_to_keep=1).logits[0]
        token = sample_tokens(logits, temperature, generator)
        response.append(int(token))
        if len(response) == 1:
            first_seconds = _clock(target.device) - started
        if len(response) == max_new_tokens or response[-1] in stops:
            break
        inputs = token[None]
    total = _clock(target.device) - started
    return Generation(response, [], [], 1, first_seconds, total - first_seconds)


@torch.inference_mode()
def generate(
    target: Target,
    drafter: Drafter,
    token_ids: Sequence[int] | Int[Tensor, " seq"],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | None = None,
) -> Generation:
    """Decode with a drafter: the target's text, in fewer of its forward passes.

    A step drafts a block after the last token, has the target read the whole block at once, accepts the draft tokens that
    equal the target's own draws, and emits them with the target's next token. The drafter always proposes its most likely
    tokens. Both caches then hold exactly the tokens before the last one.

    Memory: the target's cache, one drafter key and value a token and drafter layer, logits of one block.

    Args:
        target: the model whose text is kept.
        drafter: trained for it.
        token_ids: the prompt, one row.
        max_new_tokens: upper limit; reached exactly unless a stop token comes first.
        temperature: of the target's distribution; 0 is greedy.
        stop_token_ids: end the response, and are its last token; by default the target's own.
        seed: of the draws; by default torch's global generator.

    Returns:
        See `Generation`.

    Raises:
        ValueError: empty or over-long prompt, bad limits, or a drafter for another target.

    Source: DFlash (arXiv 2602.06036), `dflash_generate` of z-lab/dflash.
    """
    drafter.check_target(target)
    prompt, stops, generator = _prepare(target, token_ids, max_new_tokens, temperature, stop_token_ids, seed)
    device, num_prompt = target.device, prompt.shape[1]
    masks = torch.full((1, drafter.block_size), drafter.mask_token_id, device=device)
    started = _clock(device)
    cache, drafter_cache = DynamicCache(config=target.config), DynamicCache(config=drafter.config)
    cache.activate_past_recording()
    accepted_lengths, emitted_lengths = [], []
    with target.capture(drafter.target_layer_ids) as captured:
        logits = target.model(prompt, cache=cache, logits_to_keep=1).logits[0]
        response = sample_tokens(logits, temperature, generator).tolist()
        first_seconds = _clock(device) - started
        num_new = num_prompt
        while len(response) < max_new_tokens and response[-1] not in stops:
            features = torch.cat([layer[:, :num_new] for layer in captured], dim=-1)
            start = num_prompt + len(response) - 1
            block = masks.clone()
            block[0, 0] = response[-1]
            hidden = drafter(
                noise_embeds=target.embed(block),
                context_hidden_states=features,
                position_ids=torch.arange(start - num_new, start + drafter.block_size, device=device)[None],
                cache=drafter_cache,
            ).last_hidden_state
            drafter_cache.crop(-drafter.block_size)
            remaining = max_new_tokens - len(response)
            width = min(drafter.block_size, remaining + 1)
            block[0, 1:width] = target.head.logits(hidden[0, 1:width]).argmax(-1)
            logits = target.model(block[:, :width], cache=cache).logits[0]
            draft = block[0, 1:width].tolist()
            drawn = sample_tokens(logits, temperature, generator).tolist()
            accepted = verify_draft(draft, drawn)
            emitted = drawn[: min(accepted + 1, remaining)]
            stop = _first_stop(emitted, stops)
            if stop is not None:
                emitted, accepted = emitted[: stop + 1], min(accepted, stop + 1)
            response += emitted
            accepted_lengths.append(accepted)
            emitted_lengths.append(len(emitted))
            num_new = len(emitted)
            if width > num_new:
                cache.crop(num_new - width)
    total = _clock(device) - started
    return Generation(
        response, accepted_lengths, emitted_lengths, drafter.block_size, first_seconds, total - first_seconds
    )
