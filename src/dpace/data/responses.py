"""Let the target answer prompts, and keep its answers as token ids with the spans that it wrote."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from dpace.config import RespondConfig
from dpace.data.answers import Response, read_responses
from dpace.data.chat import encode_answer, encode_chat
from dpace.data.prompts import Prompt
from dpace.data.run_meta import check_meta, check_unchanged, find_meta, meta_path, read_meta, write_meta
from dpace.fast.cache import is_full_attention
from dpace.ledger import claim, cut_unfinished, hold, naming
from dpace.progress import progress_bar
from dpace.target import MIN_SHARED, Target, shared_prefix

__all__ = ["Response", "generate_responses", "read_meta", "read_responses", "write_responses"]


def write_responses(
    target: Target, prompts: Sequence[Prompt], path: str | Path, config: RespondConfig
) -> list[Response]:
    """Let the target answer prompts in batches, appending to a file after each one.

    A prompt whose id is in the file already is not answered again, so an interrupted call continues where it was.
    Beside the file, `.meta.json` tells what made it and whether it is complete. No other process may write to the
    folder meanwhile.

    Memory: O(batch_size x tokens) for the target's cache.

    Args:
        target: the model.
        prompts: what to answer; one that passes the target's context is refused before work starts.
        path: `responses.jsonl`.
        config: length, temperature, batch size, seed.

    Returns:
        The responses of all given prompts, in their order.

    Raises:
        ValueError: an over-long prompt; the file was made by another target, with other settings or from other
            prompts, or was not written by dpace; or another process is writing to its folder.
        OSError: the disk is full; the same call goes on when there is room.
    """
    path, meta = Path(path), find_meta(target, config)
    with hold(path.parent):
        claim(path.parent, path.name, meta_path(path).name)
        cut_unfinished(path)
        check_meta(path, meta)
        done = {response.id: response for response in read_responses(path)} if path.exists() else {}
        for prompt in prompts:
            if prompt.id in done and not _is_answer(done[prompt.id], prompt):
                raise ValueError(
                    f"{path} has an answer with the id {prompt.id!r}, but to another text; name another folder with "
                    "--output, or delete the file"
                )
        waiting = [(prompt, _check_length(target, prompt, config)) for prompt in prompts if prompt.id not in done]
        if waiting:
            write_meta(path, meta, prompts, is_complete=False)
            waiting.sort(key=lambda item: item[1])
            with naming(path), path.open("a", encoding="utf-8", newline="\n") as file:
                _answer_all(target, [prompt for prompt, _ in waiting], done, file, config)
        elif done:
            check_unchanged(path)
        if prompts:
            write_meta(path, meta, prompts, is_complete=True)
        return [done[prompt.id] for prompt in prompts]


def _check_length(target: Target, prompt: Prompt, config: RespondConfig) -> int:
    """Count the tokens of a prompt's first turn, and refuse a prompt that may pass the target's context.

    All its turns count, and their answers as long as they may be.
    """
    limit = getattr(target.config, "max_position_embeddings", None)
    num_first = len(encode_chat(target, prompt.turns[0]))
    num_tokens, num_turns = num_first, len(prompt.turns)
    if num_turns > 1:
        messages = list(prompt.turns[0])
        for turn in prompt.turns[1:]:
            messages += [{"role": "assistant", "content": "."}, *turn]
        num_tokens = len(encode_chat(target, messages))
    if config.source == "target" and limit and num_tokens + num_turns * config.max_new_tokens > limit:
        turns = f"{num_turns} answers of up to " if num_turns > 1 else ""
        raise ValueError(
            f"prompt {prompt.id} has {num_tokens} tokens; with {turns}{config.max_new_tokens} new tokens it passes "
            f"the target's limit of {limit}; shorten the prompt or lower --respond.max-new-tokens"
        )
    return num_first


def _answer_all(
    target: Target, waiting: Sequence[Prompt], done: dict[str, Response], file: TextIO, config: RespondConfig
) -> None:
    """Answer the prompts in batches; append each batch to the file and to `done`."""
    torch.manual_seed(config.seed)
    with progress_bar() as bar:
        task = bar.add_task("answering prompts", total=len(done) + len(waiting), completed=len(done), info="")
        num_tokens = 0
        for start in range(0, len(waiting), config.batch_size):
            batch = waiting[start : start + config.batch_size]
            answers = _answer(target, batch, config)
            file.write("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
            file.flush()
            os.fsync(file.fileno())
            done |= {answer.id: answer for answer in answers}
            num_tokens += sum(end - start for answer in answers for start, end in answer.response_spans)
            speed = num_tokens / max(1e-9, bar.tasks[task].elapsed or 1e-9)
            bar.update(task, advance=len(batch), info=f"{speed:.0f} tokens/s")


def _is_answer(response: Response, prompt: Prompt) -> bool:
    """Say whether the response answers this very prompt."""
    start = 0
    for turn in prompt.turns:
        if response.messages[start : start + len(turn)] != turn:
            return False
        start += len(turn) + 1
    return True


def _answer(target: Target, prompts: Sequence[Prompt], config: RespondConfig) -> list[Response]:
    """Answer a batch turn by turn, or take the answers that come with the prompts."""
    if config.source == "own":
        return [_take_own(target, prompt) for prompt in prompts]
    messages = [[] for _ in prompts]
    token_ids: list[list[int]] = [[] for _ in prompts]
    spans: list[list[list[int]]] = [[] for _ in prompts]
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        active = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for i in active:
            messages[i] += prompts[i].turns[turn]
        encoded = [encode_chat(target, messages[i]) for i in active]
        _check_room(target, [prompts[i] for i in active], encoded, config)
        for i, prompt_ids, answer in zip(active, encoded, generate_responses(target, encoded, config), strict=True):
            if prompt_ids[: len(token_ids[i])] != token_ids[i]:
                spans[i] = []  # the template rewrote what came before, so earlier answers are not the target's tokens
            token_ids[i] = prompt_ids + answer
            spans[i].append([len(prompt_ids), len(token_ids[i])])
            text = target.tokenizer.decode(answer, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    rows = zip(prompts, messages, token_ids, spans, strict=True)
    return [Response(prompt.id, prompt.set, said, ids, where) for prompt, said, ids, where in rows]


def _take_own(target: Target, prompt: Prompt) -> Response:
    """Make a response of the answers that a prompt comes with: all that the assistant says in it."""
    if prompt.answer is None:
        raise ValueError(
            f"prompt {prompt.id} has no reply at its end, which --respond.source own trains on; remove the prompt, or "
            "let the target answer with --respond.source target"
        )
    messages, token_ids, spans = [], [], []
    for message in [*prompt.turns[0], {"role": "assistant", "content": prompt.answer}]:
        if message["role"] == "assistant" and messages:
            before, answer = encode_answer(target, messages, message["content"])
            if before[: len(token_ids)] != token_ids:
                spans = []  # the template rewrote what came before
            token_ids = before + answer
            spans.append([len(before), len(token_ids)])
        messages.append(message)
    return Response(prompt.id, prompt.set, messages, token_ids, spans)


def _check_room(target: Target, prompts: Sequence[Prompt], encoded: list[list[int]], config: RespondConfig) -> None:
    """Refuse a turn whose text, read again through the template, has grown past the target's context."""
    limit = getattr(target.config, "max_position_embeddings", None)
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        if limit and len(token_ids) + config.max_new_tokens > limit:
            raise ValueError(
                f"a turn of prompt {prompt.id} has {len(token_ids)} tokens; with {config.max_new_tokens} new tokens it "
                f"passes the target's limit of {limit}; remove a turn or lower --respond.max-new-tokens"
            )


@torch.inference_mode()
def generate_responses(target: Target, encoded: list[list[int]], config: RespondConfig) -> list[list[int]]:
    """Continue prompts of different lengths together.

    They are padded on the left, or after the beginning that all share.
    """
    if len(encoded) > 1 and target.rotation_boundary:
        return [answer for token_ids in encoded for answer in generate_responses(target, [token_ids], config)]
    width = max(map(len, encoded))
    stops = target.stop_token_ids
    pad = stops[0] if stops else 0
    # Written in place: twice as fast on a CPU as concatenating a long cache each token.
    cache = StaticCache(config=target.config, max_cache_len=width + config.max_new_tokens)
    num_shared = _read_shared(target, encoded, cache)
    rows = [list(ids[:num_shared]) + [pad] * (width - len(ids)) + list(ids[num_shared:]) for ids in encoded]
    is_token = [[1] * num_shared + [0] * (width - len(ids)) + [1] * (len(ids) - num_shared) for ids in encoded]
    input_ids, mask = (torch.tensor(x, device=target.device) for x in (rows, is_token))
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": 1.0, "top_k": 0}
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
            **sampling,
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
    num_shared = min(shared_prefix(encoded), min(map(len, encoded)) - 1)
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
