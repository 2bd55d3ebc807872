"""Answers over HTTP, as OpenAI's API gives them: chat completions and completions, one at a time.

A request comes in as JSON; its answer goes out whole or as server-sent events. What a request asks for is done, or
changes no text, or is refused. The event loop only queues: one thread loads the models and takes all steps, since a
second team of OpenMP threads would slow both down. A `Learner` keeps the answers where one is given.
"""

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from subprocess import Popen
from typing import Any, Literal

from pydantic import AliasChoices, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

import dpace
from dpace.config import Count, CountOrZero, Entries, PositiveOrZero, SamplingConfig, options
from dpace.decode import Decoder, stream
from dpace.decode.generation import Step, make_continuation
from dpace.drafter import load_drafter
from dpace.prompts.formats import Prompt, parse_row
from dpace.serving.learner import Learner
from dpace.system.progress import describe_error, note
from dpace.system.validation import from_json
from dpace.target.chat import encode_chat

MAX_BYTES = 4 * 2**20
"""Largest body of a request."""
NO_EFFECT = ("model", "user", "store", "metadata", "stream_options", "cache_salt", "return_token_ids")
"""Fields that change no text: there is one model, and all answers have their usage and their token ids."""


@options
class Ask(SamplingConfig):
    """The fields of a request that are honoured, and those of which one value changes no text."""

    messages: Any = None
    tools: Any = None
    prompt: str | list[CountOrZero] = ""
    max_new_tokens: Count = Field(2048, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: PositiveOrZero = 1.0
    stop: Entries[str] = ()
    stream: bool = False
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    logit_bias: dict[str, None] | None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    repetition_penalty: Literal[1] = 1
    tool_choice: Literal["auto"] = "auto"


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
        self.learner: Learner | None = None
        self.round: asyncio.Task | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        self.num_open += 1
        self.make_way()
        try:
            response = await self.respond(Request(scope, receive))
            await response(scope, receive, send)
        except ValueError as error:
            await refuse(str(error))(scope, receive, send)
        finally:
            self.num_open -= 1
            self.make_way()

    def make_way(self) -> None:
        """Let the round of learning go on, or begin one, where no request is open; stop it where one is."""
        if self.learner is None:
            return
        self.learner.pause(bool(self.num_open))
        if not self.num_open and self.learner.is_due:
            try:
                # At once: in a task, a request might come before it.
                process = self.learner.begin()
            except (ValueError, OSError) as error:
                note(f"nothing is learned from the newest answers: {describe_error(error)}")
            else:
                self.round = asyncio.create_task(self.take_over(process))

    async def take_over(self, process: Popen) -> None:
        """Wait for the end of a round, and draft with its drafter from then on where that is better."""
        assert self.learner is not None
        while process.poll() is None:
            await asyncio.sleep(0.1)
        if folder := self.learner.end():
            async with self.turn:
                await asyncio.get_running_loop().run_in_executor(self.thread, self.take, folder)

    def take(self, folder: str) -> None:
        """Draft with another drafter from now on, and measure its costs before a request waits for it."""
        decoder = self.decoder
        drafter = load_drafter(folder, decoder.target)
        decoder.paces = decoder.paces.for_other(decoder.drafter, drafter)
        decoder.paces.get(decoder.target, drafter)
        decoder.drafter = drafter

    async def respond(self, request: Request) -> Response:
        """Return a page, or begin an answer, which waits for its turn.

        Raises:
            ValueError: the request cannot be answered.
        """
        place = self.num_open - 1
        target = self.decoder.target
        path = request.url.path
        if path == "/health":
            return Response()
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and not secrets.compare_digest(key.encode(), self.api_key.encode()):
            return refuse("the key is missing or wrong; send it as a Bearer token", 401)
        if path == "/version":
            return JSONResponse({"version": dpace.__version__})
        if path == "/v1/models":
            return JSONResponse({"object": "list", "data": [{"id": target.short_name, "object": "model"}]})
        if path == "/metrics":
            numbers = {f"vllm:{name}_total": total for name, total in self.totals.items()}
            numbers |= self.learner.numbers if self.learner else {}
            return PlainTextResponse("".join(f"{name} {number}\n" for name, number in numbers.items()))
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return refuse(f"there is no {path}", 404)
        if place > self.max_waiting:
            return refuse(f"{place} requests wait already; ask again later", 429)
        if int(request.headers.get("content-length", MAX_BYTES + 1)) > MAX_BYTES:
            return refuse(f"the body has more than {MAX_BYTES} bytes, or does not say how many", 413)
        asked = from_json(dict, await request.json())
        ask = from_json(Ask, {k: value for k, value in asked.items() if value is not None and k not in NO_EFFECT})
        token_ids: Any = ask.prompt
        kept = None
        if ask.messages is not None:
            prompt = parse_row({"messages": ask.messages, "tools": ask.tools}, "request", "request")
            token_ids = encode_chat(target, [*prompt.turns[0], *filter(None, [prompt.answer])])
            is_kept = asked.get("store") is not False and request.headers.get("store", "").lower() != "false"
            kept = prompt if is_kept and prompt.answer is None else None
        elif isinstance(token_ids, str):
            token_ids = target.tokenizer(token_ids)["input_ids"]
        if max(token_ids, default=0) >= len(target.head.weight):
            raise ValueError(f"prompt has the token {max(token_ids)}, which the target does not have")
        make_continuation(target, token_ids, **ask.sampling)  # which refuses what cannot be decoded
        kind = "text/event-stream" if ask.stream else "application/json"
        return StreamingResponse(self.lines(ask, token_ids, kept), 200, {"x-dpace-waiting": str(place)}, kind)

    async def lines(self, ask: Ask, token_ids: list[int], kept: Prompt | None) -> AsyncIterator[str]:
        """Decode an answer when its turn has come, and yield its events, or its only object.

        Where there is a learner, it keeps the whole answer to the prompt `kept`.
        """
        target = self.decoder.target
        now = time.time_ns()
        head = {"id": f"dpace-{now}", "created": now // 10**9, "model": target.short_name}
        role = {"role": "assistant"}
        new: list[int] = []

        def write(piece: str, end: str | None = None, **usage: Any) -> str:
            choice = {"index": 0, "finish_reason": end, "token_ids": new, "text": piece}
            kind = "text_completion"
            if ask.messages is not None:
                kind = "chat.completion.chunk" if ask.stream else "chat.completion"
                choice["delta" if ask.stream else "message"] = {**role, "content": choice.pop("text")}
            line = json.dumps({**head, "object": kind, "choices": [choice], **usage})
            role.clear()  # clients put together what the deltas have, so it stands in the first one
            new.clear()
            return f"data: {line}\n\n" if ask.stream else line

        steps: list[Step] = []
        text = ""
        found: list[int] = []
        num_held = max(map(len, ask.stop), default=1) - 1  # characters that may be the beginning of a stop text
        sampling: Any = ask.sampling
        async with self.turn:
            loop = asyncio.get_running_loop()
            drafting: Any = {"paces": self.decoder.paces, "on_step": steps.append}
            pieces = stream(target, self.decoder.drafter, token_ids, **drafting, **sampling)
            while (
                not found and (piece := await loop.run_in_executor(self.thread, lambda: next(pieces, None))) is not None
            ):
                text += piece
                new += steps[-1].token_ids
                found = [text.find(stop) for stop in ask.stop if stop in text]
                if ask.stream and not found:
                    place = max(0, len(text) - num_held)
                    yield write(text[:place])
                    text = text[place:]
        num_new = sum(len(step.token_ids) for step in steps)
        seconds = steps[-1].ended - steps[0].ended
        counts = {
            "prompt_tokens": len(token_ids),
            "completion_tokens": num_new,
            "spec_decode_num_drafts": len(steps) - 1,
            "spec_decode_num_accepted_tokens": sum(step.accepted for step in steps),
            "decode_seconds": seconds,
        }
        self.totals.update(counts)
        usage = counts | {
            "total_tokens": len(token_ids) + num_new,
            "tau": (num_new - 1) / max(1, len(steps) - 1),
            "tokens_per_second": (num_new - 1) / max(1e-9, seconds),
        }
        if self.learner and kept and not found:
            speed = {name: usage[name] for name in ("tau", "tokens_per_second")}
            answer = [token_id for step in steps for token_id in step.token_ids]
            self.learner.keep(kept, token_ids, answer, time=now // 10**9, temperature=ask.temperature, **speed)
        is_stopped = found or steps[-1].token_ids[-1] in target.stop_token_ids
        yield write(text[: min(found, default=None)], "stop" if is_stopped else "length", usage=usage)
        if ask.stream:
            yield "data: [DONE]\n\n"
