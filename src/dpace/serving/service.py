"""Answers over HTTP, as OpenAI's API gives them: chat completions and completions, one at a time.

A request comes in as JSON; its answer goes out whole or as server-sent events. What a request asks for is done, or
changes no text, or is refused. The event loop only queues: one thread loads the models and takes all steps, since a
second team of OpenMP threads would slow both down.
"""

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pydantic import AliasChoices, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

import dpace
from dpace.config import Count, CountOrZero, Entries, PositiveOrZero, SamplingConfig, options
from dpace.decode import Decoder, Generation
from dpace.decode.generation import make_continuation
from dpace.prompts.formats import parse_row
from dpace.system.validation import from_json
from dpace.target.chat import encode_chat

MAX_BYTES = 4 * 2**20
"""Largest body of a request."""
NO_EFFECT = ("model", "user", "store", "metadata", "stream_options", "cache_salt", "return_token_ids")
"""Fields that change no text: there is one model, and the last event always has the usage, and each its token ids."""
NEUTRAL = {
    "n": 1,
    "logprobs": False,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "tool_choice": "auto",
}
"""Fields that would change the text, each with the value that does not."""


@options
class Ask(SamplingConfig):
    """The fields of a request that are honoured."""

    messages: Any = None
    tools: Any = None
    prompt: str | list[CountOrZero] = ""
    max_new_tokens: Count = Field(2048, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: PositiveOrZero = 1.0
    stop: Entries[str] = ()
    stream: bool = False


def refuse(message: str, status: int = 400) -> Response:
    """Say in OpenAI's form what is wrong with a request."""
    fault = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": fault}, status)


class Service:
    """An ASGI application that answers.

    Args:
        load: loads the models, in the thread that decodes.
        max_waiting: requests that may wait while one is answered; more are refused with 429.
        api_key: what requests must bring; empty for nothing.
    """

    def __init__(self, load: Callable[[], Decoder], max_waiting: int, api_key: str):
        self.thread = ThreadPoolExecutor(1)
        self.decoder = self.thread.submit(load).result()
        self.max_waiting = max_waiting
        self.api_key = api_key
        self.turn = asyncio.Lock()
        self.num_open = 0
        self.totals: Any = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        self.num_open += 1
        try:
            response = await self.respond(Request(scope, receive))
            await response(scope, receive, send)
        except ValueError as error:
            await refuse(str(error))(scope, receive, send)
        finally:
            self.num_open -= 1

    async def respond(self, request: Request) -> Response:
        """Return a page, or begin an answer, which waits for its turn.

        Raises:
            ValueError: the request cannot be answered.
        """
        place = self.num_open - 1
        target = self.decoder.target
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        path = request.url.path
        if path == "/health":
            return Response()
        if not secrets.compare_digest(key.encode(), self.api_key.encode()):
            return refuse("the key is missing or wrong; send it as a Bearer token", 401)
        match path:
            case "/version":
                return JSONResponse({"version": dpace.__version__})
            case "/v1/models":
                return JSONResponse({"object": "list", "data": [{"id": target.short_name, "object": "model"}]})
            case "/metrics":
                return PlainTextResponse("".join(f"vllm:{name}_total {n}\n" for name, n in self.totals.items()))
            case "/v1/chat/completions" | "/v1/completions":
                pass
            case _:
                return refuse(f"there is no {path}", 404)
        if place > self.max_waiting:
            return refuse(f"{place} requests wait already; ask again later", 429)
        if int(request.headers.get("content-length", MAX_BYTES + 1)) > MAX_BYTES:
            return refuse(f"the body has more than {MAX_BYTES} bytes, or does not say how many", 413)
        asked = {}
        for name, value in from_json(dict, await request.json()).items():
            if name not in NO_EFFECT and value not in (None, NEUTRAL.get(name)):
                asked[name] = value
        ask = from_json(Ask, asked)
        token_ids: Any = ask.prompt
        if ask.messages is not None:
            prompt = parse_row({"messages": ask.messages, "tools": ask.tools}, "request", "request")
            token_ids = encode_chat(target, [*prompt.turns[0], *filter(None, [prompt.answer])])
        elif isinstance(token_ids, str):
            token_ids = target.tokenizer(token_ids)["input_ids"]
        if max(token_ids, default=0) >= len(target.head.weight):
            raise ValueError(f"prompt has the token {max(token_ids)}, which the target does not have")
        make_continuation(target, token_ids, **ask.sampling)  # which refuses what cannot be decoded
        kind = "text/event-stream" if ask.stream else "application/json"
        return StreamingResponse(self.lines(ask, token_ids), 200, {"x-dpace-waiting": str(place)}, kind)

    async def lines(self, ask: Ask, token_ids: Sequence[int]) -> AsyncIterator[str]:
        """Decode an answer when its turn has come, and yield its events, or its only object."""
        text = ""
        found: list[int] = []
        new: list[int] = []
        ends: list[Generation] = []
        role = {"role": "assistant"}
        now = time.time_ns()
        head = {"id": f"dpace-{now}", "created": now // 10**9, "model": self.decoder.target.short_name}

        def write(piece: str, end: str | None = None, **usage: Any) -> str:
            choice: Any = {"index": 0, "finish_reason": end, "token_ids": new.copy(), "text": piece}
            kind = "text_completion"
            if ask.messages is not None:
                kind = "chat.completion.chunk" if ask.stream else "chat.completion"
                choice["delta" if ask.stream else "message"] = {**role, "content": choice.pop("text")}
                role.clear()  # clients put together what deltas have, so it stands in the first one
            new.clear()
            line = json.dumps({**head, "object": kind, "choices": [choice], **usage})
            return f"data: {line}\n\n" if ask.stream else line

        num_held = max(map(len, ask.stop), default=1) - 1  # characters that may be the beginning of a stop text
        async with self.turn:
            sampling: Any = ask.sampling
            pieces = self.decoder.stream(
                token_ids, on_step=lambda step: new.extend(step.token_ids), on_end=ends.append, **sampling
            )
            take = partial(asyncio.get_running_loop().run_in_executor, self.thread, next, pieces, None)
            while not found and (piece := await take()) is not None:
                text += piece
                found = [text.find(stop) for stop in ask.stop if stop in text]
                if ask.stream and not found:
                    place = max(0, len(text) - num_held)
                    yield write(text[:place])
                    text = text[place:]
            pieces.close()
        generation = ends[0]
        num_passes = len(generation.widths)
        counts = {
            "prompt_tokens": len(token_ids),
            "completion_tokens": len(generation.token_ids),
            "spec_decode_num_drafts": num_passes,
            "spec_decode_num_draft_tokens": sum(generation.widths) - num_passes,
            "spec_decode_num_accepted_tokens": sum(generation.accepted_lengths),
            "decode_seconds": generation.decode_seconds,
        }
        self.totals.update(counts)
        usage = counts | {
            "total_tokens": len(token_ids) + len(generation.token_ids),
            "tau": generation.num_decode_tokens / max(1, num_passes),
            "tokens_per_second": generation.tokens_per_second,
        }
        is_stopped = found or generation.token_ids[-1] in self.decoder.target.stop_token_ids
        yield write(text[: min(found, default=None)], "stop" if is_stopped else "length", usage=usage)
        if ask.stream:
            yield "data: [DONE]\n\n"
