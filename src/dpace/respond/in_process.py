"""Let the target answer prompts in this process, a batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from dpace.config import RespondConfig
from dpace.decode.batch import Batch, batch_fault
from dpace.decode.generation import make_continuation
from dpace.decode.sampling import Sampler
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.respond.responses import Response
from dpace.target import Target, answer_end
from dpace.target.chat import ChatTokenizer


def answer_batches(
    target: Target | ChatTokenizer,
    prompts: Sequence[Prompt],
    config: RespondConfig,
    show: Callable[..., object],
) -> Iterator[list[Response]]:
    """Answer prompts in batches, turn by turn, or take the answers that they come with; yield each batch.

    Args:
        target: the model; its tokenizer is enough for answers that are given.
        prompts: what is answered.
        config: length, temperature, batch size, seed.
        show: gets, after each token, an `info` that says where the batch stands.
    """
    if config.source == "own":
        for prompt in prompts:
            conversation = Conversation(target, prompt, config)
            conversation.add_own_answers()
            yield [conversation.response]
        return
    assert isinstance(target, Target), "a tokenizer alone answers nothing"
    for start in range(0, len(prompts), config.batch_size):
        chosen = prompts[start : start + config.batch_size]
        batch = [Conversation(target, prompt, config) for prompt in chosen]
        # One round a turn: conversations with fewer turns leave the batch before the others.
        while active := [conversation for conversation in batch if not conversation.is_answered]:
            encoded = [conversation.ask() for conversation in active]
            seeds = [conversation.seed for conversation in active]
            answers = generate_responses(target, encoded, config, seeds, show)
            for conversation, token_ids, answer in zip(active, encoded, answers, strict=True):
                conversation.add(token_ids, answer)
        yield [conversation.response for conversation in batch]


@torch.inference_mode()
def generate_responses(
    target: Target,
    encoded: list[list[int]],
    config: RespondConfig,
    seeds: Sequence[int],
    show: Callable[..., object] = lambda **_: None,
) -> list[list[int]]:
    """Continue prompts of different lengths together.

    A beginning that several prompts share is read once, and prompts that are answered leave the batch. A target whose
    rows cannot have different lengths runs transformers' loop instead, with padding on the left.

    Memory: keys and values of the longest prompt and `max_new_tokens` for each prompt, and what `read_texts` needs.

    Args:
        target: the model.
        encoded: token ids of each prompt.
        config: length and temperature.
        seeds: one for each prompt; they count for a temperature above 0.
        show: gets, after each token, an `info` that says where the batch stands.
    """
    length = config.max_new_tokens
    lengths = [(len(token_ids), len(token_ids) + length) for token_ids in encoded]  # in the beginning, and at most
    if batch_fault(target, lengths):
        if not target.rotation_boundary:
            return _generate_padded(target, encoded, config, seeds)
        # Such a target rotates all positions by the length of the longest row, padding too: each prompt is a batch.
        answers = []
        for token_ids, seed in zip(encoded, seeds, strict=True):
            answers += _generate_padded(target, [token_ids], config, [seed])
        return answers
    rows = []
    for token_ids, seed in zip(encoded, seeds, strict=True):
        row = make_continuation(target, token_ids, max_new_tokens=length, temperature=config.temperature, seed=seed)
        rows.append(row)
    batch = Batch(target, None, rows)
    for number, _ in enumerate(batch.steps(), start=1):  # rows grow in place, and leave `batch.rows` at their end
        show(info=f"token {number} of at most {length}, {len(batch.rows)} of {len(rows)} prompts are open")
    return [row.token_ids[row.num_prompt :] for row in rows]


class _Draws(LogitsProcessor):
    """Makes the draw of each row's own sampler the largest score.

    So a text does not depend on which prompts are answered together.
    """

    def __init__(self, samplers: Sequence[Sampler]):
        self.samplers = samplers

    def __call__(self, input_ids: Int[Tensor, "row seq"], scores: Float[Tensor, "row vocab"]) -> Tensor:
        """Draw the next token of each row."""
        # The position counts padding and prompt too; a sampler minds only that it grows by one a call.
        position = input_ids.shape[1]
        drawn = []
        for sampler, row in zip(self.samplers, scores.split(1), strict=True):
            drawn.append(sampler.draw(sampler.scores(row, []), position))
        # (row, 1) tokens; the greedy search that follows can take no other.
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.stack(drawn), 0.0)


def _generate_padded(
    target: Target, encoded: list[list[int]], config: RespondConfig, seeds: Sequence[int]
) -> list[list[int]]:
    """Continue prompts as `generate_responses` does, padded on the left, with the loop of transformers."""
    rows = [torch.tensor(token_ids) for token_ids in encoded]
    # -1 is no token, so the mask can be read off it; the padding that the model sees is token 0.
    padded = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left").to(target.device)
    width = padded.shape[1]
    draws = LogitsProcessorList()
    if config.temperature > 0:
        draws.append(_Draws([Sampler(config.temperature, seed=seed, device=target.device) for seed in seeds]))
    texts = run_transformers(
        target,
        padded.clamp_min(0),
        attention_mask=(padded >= 0).long(),
        max_new_tokens=config.max_new_tokens,
        # Written in place: twice as fast on a CPU as concatenating a long cache each token.
        cache=StaticCache(config=target.config, max_cache_len=width + config.max_new_tokens),
        logits_processor=draws,
    )
    # Rows that end early are padded up to the longest one.
    return [answer[: answer_end(answer, target.stop_token_ids)] for answer in texts[:, width:].tolist()]


def run_transformers(target: Target, token_ids: Int[Tensor, "row seq"], **options: Any) -> Int[Tensor, "row longer"]:
    """Continue rows with transformers' own loop, up to a stop token, and without the target's generation config.

    That may ask for penalties, beams or other things that decoding here does not do.
    """
    stops = target.stop_token_ids or None
    saved_config = target.model.generation_config
    # As an argument it would not do: `generate` fills what that leaves open from the model's.
    target.model.generation_config = GenerationConfig()
    try:
        return target.model.generate(
            token_ids, do_sample=False, disable_compile=True, pad_token_id=0, eos_token_id=stops, **options
        )
    finally:
        target.model.generation_config = saved_config
