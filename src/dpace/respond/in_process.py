"""Let the target answer prompts in this process, a batch at a time."""

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from dpace.config import RespondConfig
from dpace.fast.cache import is_full_attention
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.respond.responses import Response
from dpace.target import MIN_SHARED, Target


def answer_batches(target: Target, prompts: Sequence[Prompt], config: RespondConfig) -> Iterator[list[Response]]:
    """Answer prompts in batches, turn by turn, and yield each batch."""
    for start in range(0, len(prompts), config.batch_size):
        batch = [Conversation(target, prompt, config) for prompt in prompts[start : start + config.batch_size]]
        while active := [conversation for conversation in batch if not conversation.is_answered]:
            encoded = [conversation.ask() for conversation in active]
            seeds = [conversation.seed for conversation in active]
            answers = generate_responses(target, encoded, config, seeds)
            for conversation, token_ids, answer in zip(active, encoded, answers, strict=True):
                conversation.add(token_ids, answer)
        yield [conversation.response for conversation in batch]


class _Draws(LogitsProcessor):
    """Makes a draw from the target's distribution the largest score, with each row's own generator.

    So a text does not depend on which prompts are answered together. The draws are those of
    `dpace.decode.sampling.Sampler`.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Int[Tensor, "row seq"], scores: Float[Tensor, "row vocab"]) -> Tensor:
        """Divide probabilities by exponential numbers: token `x` is the largest with probability `p[x]`."""
        chances = torch.softmax(scores.float() / self.temperature, dim=-1)
        for row, generator in zip(chances, self.generators, strict=True):
            row.div_(torch.empty_like(row).exponential_(generator=generator))
        return chances


@torch.inference_mode()
def generate_responses(
    target: Target, encoded: list[list[int]], config: RespondConfig, seeds: Sequence[int] = ()
) -> list[list[int]]:
    """Continue prompts of different lengths together.

    They are padded on the left, or after the beginning that all share.

    Args:
        target: the model.
        encoded: token ids of each prompt.
        config: length and temperature.
        seeds: one for each prompt, for a temperature above 0.
    """
    if len(encoded) > 1 and target.rotation_boundary:
        alone = [[token_ids] for token_ids in encoded]
        return [generate_responses(target, one, config, seeds[i : i + 1])[0] for i, one in enumerate(alone)]
    target.refresh_copies()
    width = max(map(len, encoded))
    stops = target.stop_token_ids
    pad = stops[0] if stops else 0
    # Written in place: twice as fast on a CPU as concatenating a long cache each token.
    cache = StaticCache(config=target.config, max_cache_len=width + config.max_new_tokens)
    num_shared = _read_shared(target, encoded, cache)
    rows = [list(ids[:num_shared]) + [pad] * (width - len(ids)) + list(ids[num_shared:]) for ids in encoded]
    is_token = [[1] * num_shared + [0] * (width - len(ids)) + [1] * (len(ids) - num_shared) for ids in encoded]
    input_ids, mask = (torch.tensor(x, device=target.device) for x in (rows, is_token))
    draws = LogitsProcessorList()
    if config.temperature > 0:
        draws.append(_Draws(config.temperature, seeds, target.device))
    # The target's own generation config may ask for penalties, beams or other things that decoding here does not do.
    own, target.model.generation_config = target.model.generation_config, GenerationConfig()
    try:
        out = target.model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=stops or None,
            cache=cache,
            disable_compile=True,
            do_sample=False,
            logits_processor=draws,
        )
    finally:
        target.model.generation_config = own
    answers = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers


def _read_shared(target: Target, encoded: list[list[int]], cache: StaticCache) -> int:
    """Read the beginning that all prompts share once, into every row of the cache.

    Returns:
        Its length in tokens; 0 where it is too short to be read on its own.
    """
    num_shared = min(len(commonprefix(encoded)), min(map(len, encoded)) - 1)
    if len(encoded) == 1 or num_shared < MIN_SHARED:
        return 0
    shared: Any = DynamicCache(config=target.config)
    if not is_full_attention(shared):
        return 0  # windows count the padding that would stand between the beginning and the rest
    target.model(torch.tensor([encoded[0][:num_shared]], device=target.device), cache=shared, logits_to_keep=1)
    for number, layer in enumerate(shared.layers):
        expand = (len(encoded), -1, -1, -1)
        cache.update(layer.keys.expand(expand), layer.values.expand(expand), number)
    return num_shared
