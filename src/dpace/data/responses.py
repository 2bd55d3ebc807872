"""Let the target answer prompts, and keep its answers as token ids with the spans that it wrote."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from dpace.config import RespondConfig
from dpace.data.chat import encode_chat, tokenizer_hashes
from dpace.data.prompts import Prompt
from dpace.fast.cache import is_full_attention
from dpace.ledger import cut_unfinished, read_jsonl
from dpace.progress import progress_bar
from dpace.provenance import find_versions
from dpace.target import MIN_SHARED, Target, shared_prefix


@dataclass(frozen=True)
class Response:
    """One conversation with the target's answers: a line of `responses.jsonl`."""

    id: str
    set: str
    messages: list[dict[str, str]]
    token_ids: list[int]
    """The whole conversation as the target read and wrote it."""
    response_spans: list[list[int]]
    """Span [start, end) of each answer of the target, stop token included."""

    @property
    def is_response(self) -> list[bool]:
        """For each token, whether the target wrote it."""
        flags = [False] * len(self.token_ids)
        for start, end in self.response_spans:
            flags[start:end] = [True] * (end - start)
        return flags


def write_responses(
    target: Target, prompts: Sequence[Prompt], path: str | Path, config: RespondConfig
) -> list[Response]:
    """Let the target answer prompts in batches, appending to a file after each one.

    A prompt whose id is in the file already is not answered again, so an interrupted call continues where it was.
    Beside the file, `.meta.json` tells what made it.

    Memory: O(batch_size x tokens) for the target's cache.

    Args:
        target: the model.
        prompts: what to answer; one that passes the target's context is refused before work starts.
        path: `responses.jsonl`.
        config: length, temperature, batch size, seed.

    Returns:
        The responses of all given prompts, in their order.

    Raises:
        ValueError: an over-long prompt, or the file was made by another target, with other settings or from other
            prompts.
    """
    path = Path(path)
    _check_meta(path, _meta(target, config))
    done = {response.id: response for response in read_responses(path)} if path.exists() else {}
    for prompt in prompts:
        if prompt.id in done and not _is_answer(done[prompt.id], prompt):
            raise ValueError(
                f"{path} has an answer with the id {prompt.id!r}, but to another text; name another folder with "
                "--output, or delete the file"
            )
    waiting = [(prompt, encode_chat(target, prompt.turns[0])) for prompt in prompts if prompt.id not in done]
    limit = getattr(target.config, "max_position_embeddings", None)
    for prompt, token_ids in waiting:
        if limit and len(token_ids) + config.max_new_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id} has {len(token_ids)} tokens; with {config.max_new_tokens} new tokens it passes "
                f"the target's limit of {limit}; shorten the prompt or lower --respond.max-new-tokens"
            )
    waiting.sort(key=lambda item: len(item[1]))
    torch.manual_seed(config.seed)
    with progress_bar() as bar, path.open("a", encoding="utf-8") as file:
        task = bar.add_task("answering prompts", total=len(prompts), completed=len(prompts) - len(waiting), info="")
        num_tokens = 0
        for start in range(0, len(waiting), config.batch_size):
            batch = [prompt for prompt, _ in waiting[start : start + config.batch_size]]
            for response in _answer(target, batch, config):
                file.write(json.dumps(asdict(response), ensure_ascii=False) + "\n")
                done[response.id] = response
                num_tokens += sum(end - start for start, end in response.response_spans)
            file.flush()
            speed = num_tokens / max(1e-9, bar.tasks[task].elapsed or 1e-9)
            bar.update(task, advance=len(batch), info=f"{speed:.0f} tokens/s")
    return [done[prompt.id] for prompt in prompts]


def read_responses(path: str | Path) -> list[Response]:
    """Read `responses.jsonl`.

    A last line that a killed process left unfinished is cut off the file.

    Raises:
        ValueError: a line in the middle that cannot be read, or one without tokens.
    """
    path = Path(path)
    cut_unfinished(path)
    responses = []
    for number, row in read_jsonl(path):
        try:
            responses.append(Response(**{key: row[key] for key in Response.__dataclass_fields__}))
        except KeyError as error:
            raise ValueError(
                f"{path}:{number}: the line has no {error}; write the file again with `dpace respond`"
            ) from error
    return responses


def _is_answer(response: Response, prompt: Prompt) -> bool:
    """Say whether the response answers this very prompt."""
    start = 0
    for turn in prompt.turns:
        if response.messages[start : start + len(turn)] != turn:
            return False
        start += len(turn) + 1
    return True


def _answer(target: Target, prompts: Sequence[Prompt], config: RespondConfig) -> list[Response]:
    """Answer a batch turn by turn."""
    messages = [[] for _ in prompts]
    token_ids: list[list[int]] = [[] for _ in prompts]
    spans: list[list[list[int]]] = [[] for _ in prompts]
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        active = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for i in active:
            messages[i] += prompts[i].turns[turn]
        encoded = [encode_chat(target, messages[i]) for i in active]
        for i, prompt_ids, answer in zip(active, encoded, generate_responses(target, encoded, config), strict=True):
            if prompt_ids[: len(token_ids[i])] != token_ids[i]:
                spans[i] = []  # the template rewrote what came before, so earlier answers are not the target's tokens
            token_ids[i] = prompt_ids + answer
            spans[i].append([len(prompt_ids), len(token_ids[i])])
            text = target.tokenizer.decode(answer, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    rows = zip(prompts, messages, token_ids, spans, strict=True)
    return [Response(prompt.id, prompt.set, said, ids, where) for prompt, said, ids, where in rows]


@torch.inference_mode()
def generate_responses(target: Target, encoded: list[list[int]], config: RespondConfig) -> list[list[int]]:
    """Continue prompts of different lengths together.

    They are padded on the left, or after the beginning that all share.
    """
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


def _meta(target: Target, config: RespondConfig) -> dict:
    """Give what the responses depend on: target, tokenizer, settings and versions."""
    return {
        "target": target.name,
        "revision": getattr(target.model.config, "_commit_hash", None),
        **tokenizer_hashes(target),
        "dtype": str(target.model.dtype),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "thinking": target.thinking,
        "seed": config.seed,
        "versions": vars(find_versions()),
    }


def _check_meta(path: Path, meta: dict) -> None:
    """Write the meta file, or refuse to mix with responses that were made in another way."""
    meta_path = path.with_suffix(".meta.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and meta_path.exists():
        old = json.loads(meta_path.read_text())
        for key in sorted(set(meta) - {"versions"}):
            if old.get(key) != meta[key]:
                raise ValueError(
                    f"{path} was made with {key} {old.get(key)!r}, not {meta[key]!r}; name another folder with "
                    "--output, or delete the file"
                )
    meta_path.write_text(json.dumps(meta, indent=2) + "\n")
