"""Let running servers of the target answer prompts: several servers, many requests at each.

Prompts come in; rows for `responses.jsonl` go out, in the order in which they come. All workers take from one queue of
prompts. What a server sends is turned into the tokens that the target would have kept, or the prompt is left out.
"""

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tenacity

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.respond.responses import Response
from dpace.servers.apis import Answer, Server, connect
from dpace.servers.transport import Refused, Unavailable
from dpace.system.progress import note
from dpace.target import Target, answer_end
from dpace.target.chat import ChatTokenizer

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds until a worker whose request failed sends another: doubled with each failure, and less by chance."""
LEAST_FAILURES = 4
"""Requests in a row that fail before a prompt is left out: two may be far apart, and say nothing of the prompt."""
OF_PROMPT = (400, 413, 422)
"""HTTP statuses that refuse one prompt; others refuse all of them."""

Row = tuple[Response, dict[str, Any]]
"""An answer, and what else its line says: engine, model, and for each turn `stop` or `length`."""


class LeftOut(ValueError):
    """A prompt gets no answer, for a reason that is the same for all prompts of a kind.

    Args:
        reason: such as that an answer's tokens are not known, or that it does not end where the target's would.
        detail: more of it, for this prompt.
    """

    def __init__(self, reason: str, detail: object = None):
        super().__init__(str(detail or reason))
        self.reason = reason


def tokens_of_answer(
    answer: Answer, prompt: Sequence[int], target: Target | ChatTokenizer, max_new_tokens: int
) -> tuple[list[int], str]:
    """Return the tokens of an answer, its stop token included, and `stop` or `length`.

    Raises:
        LeftOut: a text that cannot be turned into the tokens that made it; a stop token that is not the target's;
            or an answer that the server cut.
    """
    stops = list(target.stop_token_ids)
    tokens = answer.token_ids or _tokenize(answer, list(prompt), target.tokenizer)
    if end := answer_end(tokens, stops):
        return tokens[:end], "stop"
    if not answer.is_stopped:
        if len(tokens) < max_new_tokens:
            raise LeftOut("cut by the server, whose context is too short")
        return tokens, "length"
    is_told = answer.last.num_tokens == len(tokens)
    named = stops if answer.last.stop_token is None else [answer.last.stop_token]
    if len(named) != 1 or named[0] not in stops or (is_told and answer.token_ids):
        raise LeftOut("ended by a token that is not known to be a stop token of the target")
    return [*tokens, *named], "stop"


def _tokenize(answer: Answer, prompt: list[int], tokenizer: Any) -> list[int]:
    """Turn a text back into tokens; the text that they give and their number must be the server's."""
    text = answer.last.text or ""
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole, before = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (prompt + tokens, prompt)
    )
    allowed = (None, len(tokens), len(tokens) + answer.is_stopped)
    if whole != before + text or answer.last.num_tokens not in allowed:
        raise LeftOut("given as a text that is not turned back into its own tokens")
    return tokens


@dataclass
class _Job:
    """A prompt on its way."""

    conversation: Conversation
    reasons: list[str] = field(default_factory=list)
    """Why each answer ended."""
    failing_since: float | None = None
    """When the failures began that no answered turn has come after."""
    num_failures: int = 0
    """How many these are."""


Result = tuple[_Job, Row | Exception]
"""What became of a prompt: an answer, `LeftOut`, `Unavailable` where its server is given up, or what ends the call."""


class ServerAnswers:
    """Running servers, each asked no more than `batch_size` prompts at any time.

    A prompt that a server cannot answer now goes back to the queue, from which any server may take it; who asked for it
    waits, longer with each failure in a row, and as long as the server wants (`Retry-After`). After `retry_seconds` and
    `LEAST_FAILURES` failures a prompt is left out where the server still answers a prompt of one token. A server that
    does not is given up, and with the last one the call ends.

    Args:
        target: its tokenizer and its chat template make the prompts; the servers get and give token ids.
        config: addresses, requests at once, length, temperature, seed.

    Raises:
        ValueError: an address that is none, a server that does not answer or is of no known kind.
    """

    def __init__(self, target: Target | ChatTokenizer, config: RespondConfig):
        self.target = target
        self.config = config
        self.servers = [connect(url, len(target.tokenizer)) for url in config.server]
        self.left_out: Counter[str] = Counter()
        """Prompts without an answer, by the reason."""

    @property
    def described(self) -> list[dict[str, str | None]]:
        """Engine and model of each kind of server, without addresses, which may change."""
        return [dict(pairs) for pairs in dict.fromkeys(tuple(_describe(server).items()) for server in self.servers)]

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
        """Yield the answers as they come, at once what came since the last time, until every prompt has its end.

        Raises:
            ValueError: the last server was given up, a server refuses every request, or sends what is no answer.
        """
        waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        for prompt in prompts:
            waiting.put(_Job(Conversation(self.target, prompt, self.config)))
        for server in self.servers if prompts else ():
            with contextlib.suppress(Unavailable):  # which is asked again
                _ask_one_token(server, Conversation(self.target, prompts[0], self.config))
        pools = [_ServerPool(server, self.config, waiting, results) for server in self.servers]
        for pool in pools:
            for _ in range(min(self.config.batch_size, len(prompts))):
                threading.Thread(target=pool.work, daemon=True).start()  # ends with the process, whatever it waits for
        num_open = len(prompts)
        try:
            while num_open:
                recent = [results.get()]
                while not results.empty():
                    recent.append(results.get())
                if rows := [result for _, result in recent if isinstance(result, tuple)]:
                    yield rows
                num_open -= len(recent)
                for job, result in recent:
                    if isinstance(result, LeftOut):
                        self.left_out[result.reason] += 1
                        if self.left_out[result.reason] == 1:  # of each reason the first one is printed at once
                            note(f"prompt {job.conversation.prompt.id} is left out: {result}")
                    elif isinstance(result, Unavailable) and not all(pool.is_given_up for pool in pools):
                        num_open += 1  # another server takes it
                    elif isinstance(result, Unavailable):
                        raise ValueError(
                            f"{result}; it was asked again for {self.config.retry_seconds:g} seconds; finished answers "
                            "are kept: run the same command to go on"
                        )
                    elif isinstance(result, Exception):
                        raise result
        finally:
            for pool in pools:
                pool.is_given_up = True
            waiting.put(None)


def _ask_one_token(server: Server, conversation: Conversation) -> None:
    """Ask for one token after the first one of a prompt, which a server that works gives for any prompt."""
    server.answer(conversation.ask()[:1], 1, 0.0, 0, stream=False)


def _describe(server: Server) -> dict[str, str | None]:
    return {"engine": server.engine, "model": server.model and server.address.short(server.model)}


@dataclass
class _ServerPool:
    """A server, and the threads that ask it."""

    server: Server
    config: RespondConfig
    waiting: queue.SimpleQueue[_Job | None]
    """Prompts without an answer; None ends the threads of all servers."""
    results: queue.SimpleQueue[Result]
    is_given_up: bool = False
    """Whether no other prompt is asked here."""
    failing_since: float | None = None
    """When the failures began that no answer has come after."""

    def work(self) -> None:
        """Answer prompts until none is left or the server is given up; a thread's work."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(FIRST_WAIT, min(LONGEST_WAIT, self.config.retry_seconds)),
        )
        while retrying(self._answer_next):
            pass

    def _answer_next(self) -> bool:
        """Answer the next prompt.

        Returns:
            Whether there may be another one for this server.

        Raises:
            Unavailable: the server does not answer now; the prompt is back in the queue.
        """
        job = self.waiting.get()
        if job is None or self.is_given_up:
            self.waiting.put(job)
            return False
        try:
            result = self._ask(job)
        except Unavailable as error:
            return self._postpone(job, error)
        except Refused as error:
            result = error
            if error.status in OF_PROMPT:
                result = LeftOut(f"refused by the server with status {error.status}", error)
        except Exception as error:  # a left-out prompt, or what ends the call
            result = error
        self.results.put((job, result))
        return True

    def _ask(self, job: _Job) -> Row:
        """Answer the turns of a prompt that have no answer yet."""
        conversation = job.conversation
        length = self.config.max_new_tokens
        while not conversation.is_answered:
            token_ids = conversation.ask()
            answer = self.server.answer(token_ids, length, self.config.temperature, conversation.seed, stream=False)
            self.failing_since = None
            job.failing_since = None
            job.num_failures = 0
            tokens, reason = tokens_of_answer(answer, token_ids, conversation.target, length)
            conversation.add(token_ids, tokens)
            job.reasons.append(reason)
        return conversation.response, _describe(self.server) | {"finish_reasons": job.reasons}

    def _postpone(self, job: _Job, error: Unavailable) -> bool:
        """Put a prompt back; after `retry_seconds` of failures leave it out or give the server up.

        Returns:
            As `_answer_next`, where the prompt is left out or the server given up.

        Raises:
            Unavailable: the one that is given, where another attempt is due.
        """
        now = time.monotonic()
        limit = self.config.retry_seconds
        job.failing_since = job.failing_since or now
        self.failing_since = self.failing_since or now
        job.num_failures += 1
        is_late = now - job.failing_since >= limit and job.num_failures >= LEAST_FAILURES
        is_server_late = now - self.failing_since >= limit
        if (is_late or is_server_late) and self._works(job):
            self.failing_since = None
            if is_late:
                self.results.put((job, LeftOut("the server fails for it, and not for others", error)))
                return True
        elif is_server_late:
            job.failing_since = None
            job.num_failures = 0
            self.waiting.put(job)
            self.is_given_up = True
            self.results.put((job, error))
            return False
        self.waiting.put(job)
        time.sleep(min(error.retry_after, limit))
        raise error

    def _works(self, job: _Job) -> bool:
        """Try out whether the server fails or this prompt."""
        try:
            _ask_one_token(self.server, job.conversation)
        except ValueError:
            return False
        return True
