"""Let the target answer prompts in this process, a new one as soon as one is finished.

This is transformers' continuous batching, on a GPU. On a CPU the texts are the same too, and a batch at a time is four
times as fast (two cores, transformers 5.24, 24 answers of 48 tokens from a model of 6 small layers).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from transformers import ContinuousBatchingConfig, GenerationConfig

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.answers import Response
from dpace.respond.conversation import Conversation
from dpace.respond.static_batch import answer_batches
from dpace.target import Target
from dpace.target.chat import context_of

PAGE_TOKENS = 256
"""Tokens of a page of the cache, transformers' own default."""
NUM_TRIED, LENGTH_TRIED = 8, 32
"""Prompts, and tokens of each, that are answered both ways before continuous batching is used."""


def answer_here(target: Target, prompts: Sequence[Prompt], config: RespondConfig) -> Iterator[list[Response]]:
    """Answer prompts here: continuously on a GPU where that gives the same texts, else in batches."""
    is_worth_it = config.temperature == 0 and target.device.type == "cuda" and len(prompts) > config.batch_size
    if is_worth_it and gives_same_texts(target, prompts[:NUM_TRIED], config):
        return answer_continuously(target, prompts, config)
    return answer_batches(target, prompts, config)


def gives_same_texts(target: Target, prompts: Sequence[Prompt], config: RespondConfig) -> bool:
    """Answer a few prompts both ways, and say why the results cannot be used where they differ."""
    short = replace(config, max_new_tokens=min(LENGTH_TRIED, config.max_new_tokens))
    first = [replace(prompt, turns=prompt.turns[:1]) for prompt in prompts]
    expected = {one.id: one for batch in answer_batches(target, first, short) for one in batch}
    try:
        found = {one.id: one for some in answer_continuously(target, first, short) for one in some}
    except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
        reason = f"transformers cannot do it for this target ({error})"
    else:
        if found == expected:
            return True
        reason = "it gives other texts, as rounding or a bug may"
    print(f"prompts are answered a batch at a time, not continuously: {reason}", file=sys.stderr)
    return False


def answer_continuously(target: Target, prompts: Sequence[Prompt], config: RespondConfig) -> Iterator[list[Response]]:
    """Answer prompts greedily, `batch_size` at a time, and yield each when its last turn is answered.

    Memory: keys and values of `batch_size` texts of the longest length.

    Raises:
        ValueError: transformers has no continuous batching for this target.
        RuntimeError: it failed for a prompt, or stopped.
    """
    conversations = {str(number): Conversation(target, prompt, config) for number, prompt in enumerate(prompts)}
    asked = {name: conversation.ask() for name, conversation in conversations.items()}
    turns = max(len(prompt.turns) for prompt in prompts)
    longest = turns * (2 * max(map(len, asked.values())) + config.max_new_tokens)
    longest = min(longest, context_of(target) or longest)
    sizes = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=config.batch_size * (-(-longest // PAGE_TOKENS) + 1),
        max_requests_per_batch=config.batch_size,
    )
    stops = target.stop_token_ids
    greedy = GenerationConfig(do_sample=False, eos_token_id=stops or None, pad_token_id=next(iter(stops), 0))
    options = {"generation_config": greedy, "continuous_batching_config": sizes, "warmup": False}
    with target.model.continuous_batching_context_manager(**options) as manager:
        for name, token_ids in asked.items():
            manager.add_request(token_ids, request_id=name, max_new_tokens=config.max_new_tokens)
        while asked:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before its end")
            if result is None or not result.is_finished():
                continue
            if result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
            name, answer = result.request_id, result.generated_tokens
            end = next((i + 1 for i, token in enumerate(answer) if token in stops), len(answer))
            conversation = conversations[name]
            conversation.add(asked.pop(name), answer[:end])
            if conversation.is_answered:
                yield [conversations.pop(name).response]
                continue
            asked[name] = conversation.ask()
            manager.add_request(asked[name], request_id=name, max_new_tokens=config.max_new_tokens)
