"""Let the target answer prompts in this process, a batch at a time."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from dpace.config import RespondConfig
from dpace.decode.batch import Batch, RowCaches, check_batch
from dpace.decode.request import make_continuation
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.respond.responses import Response
from dpace.target import Target


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


@torch.inference_mode()
def generate_responses(
    target: Target, encoded: list[list[int]], config: RespondConfig, seeds: Sequence[int] = ()
) -> list[list[int]]:
    """Continue prompts of different lengths together.

    A beginning that several prompts share is read once, and prompts that are answered leave the batch. A target whose
    rows cannot have different lengths runs transformers' loop instead, with padding on the left.

    Memory: keys and values of the longest prompt and `max_new_tokens` for each prompt, and what `read_texts` needs.

    Args:
        target: the model.
        encoded: token ids of each prompt.
        config: length and temperature.
        seeds: one for each prompt, for a temperature above 0.
    """
    length, temperature = config.max_new_tokens, config.temperature
    try:
        rows = [
            make_continuation(target, token_ids, max_new_tokens=length, temperature=temperature, seed=seed)
            for token_ids, seed in zip_longest(encoded, seeds)
        ]
        check_batch(target, rows)
        caches = RowCaches(target, None, 1 + max(row.limit for row in rows))
    except ValueError:
        size = 1 if target.rotation_boundary else len(encoded)
        parts = [slice(start, start + size) for start in range(0, len(encoded), size)]
        return [answer for part in parts for answer in _generate_padded(target, encoded[part], config, seeds[part])]
    batch = Batch(target, None, list(rows), caches)
    batch.run()
    return [row.token_ids[row.num_prompt :] for row in rows]


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


def _generate_padded(
    target: Target, encoded: list[list[int]], config: RespondConfig, seeds: Sequence[int]
) -> list[list[int]]:
    """Continue prompts as `generate_responses` does, padded on the left, with the loop of transformers."""
    width = max(map(len, encoded))
    stops = target.stop_token_ids
    pad = stops[0] if stops else 0
    rows = [[pad] * (width - len(ids)) + ids for ids in encoded]
    is_token = [[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]
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
            # Written in place: twice as fast on a CPU as concatenating a long cache each token.
            cache=StaticCache(config=target.config, max_cache_len=width + config.max_new_tokens),
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
