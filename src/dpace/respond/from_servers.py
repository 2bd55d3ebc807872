"""Let running servers of the target answer prompts: several servers, many requests at each.

The tokens of a server's answer, as the target would have kept them, or why they are not known.
"""

import contextlib
import heapq
import itertools
import queue
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.answers import Response
from dpace.respond.conversation import Conversation
from dpace.servers.apis import Answer, Server, connect
from dpace.servers.transport import Refused, Unavailable
from dpace.system.progress import printable
from dpace.target import Target
from dpace.target.chat import ChatTokenizer


class NotItsTokens(ValueError):
    """The answer's tokens are not known, or the answer does not end where the target's would."""


def tokens_of_answer(
    answer: Answer, prompt: Sequence[int], target: Target | ChatTokenizer, max_new_tokens: int
) -> tuple[list[int], str]:
    """Give the tokens of an answer, its stop token included, and `stop` or `length`.

    Raises:
        NotItsTokens: a text that cannot be turned into the tokens that made it; a stop token that is not the target's;
            or an answer that the server cut.
    """
    stops = list(target.stop_token_ids)
    tokens = answer.token_ids or _tokenize(answer, list(prompt), target.tokenizer)
    if end := next((i + 1 for i, token in enumerate(tokens) if token in stops), None):
        return tokens[:end], "stop"
    if not answer.is_stopped:
        if len(tokens) < max_new_tokens:
            raise NotItsTokens("cut by the server, whose context is too short")
        return tokens, "length"
    is_told = answer.num_tokens is not None and answer.num_tokens == len(tokens)
    named = [answer.stop_token] if answer.stop_token is not None else stops
    if len(named) != 1 or named[0] not in stops or (is_told and answer.token_ids):
        raise NotItsTokens("ended by a token that is not known to be a stop token of the target")
    return [*tokens, *named], "stop"


def _tokenize(answer: Answer, prompt: list[int], tokenizer: Any) -> list[int]:
    """Turn a text back into tokens; the text that they give and their number must be the server's."""
    text = answer.text or ""
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole, before = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (prompt + tokens, prompt)
    )
    allowed = (len(tokens), len(tokens) + answer.is_stopped)
    if whole != before + text or (answer.num_tokens is not None and answer.num_tokens not in allowed):
        raise NotItsTokens("given as a text that is not turned back into its own tokens")
    return tokens


FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds until a request that failed is sent again: doubled with each failure, and up to half of it less by chance."""
OF_PROMPT = (400, 413, 422)
"""HTTP statuses that refuse one prompt; others refuse all of them."""

Row = tuple[Response, dict[str, Any]]
"""An answer, and what else its line says: engine, model, and for each turn `stop` or `length`."""


class ServerAnswers:
    """Running servers, each asked no more than `batch_size` prompts at any time.

    A prompt that a server cannot answer now goes to whichever server is free first, after a wait that doubles with each
    failure. A server that asks to wait (`Retry-After`) rests as long. After `retry_seconds` of failures a prompt is
    left out where the server still answers a prompt of one token. A server that does not is given up, and with the last
    one the call ends.

    Args:
        target: its tokenizer and its chat template make the prompts; the servers get and give token ids.
        config: addresses, requests at once, length, temperature, seed.

    Raises:
        ValueError: an address that is none, a server that does not answer or is of no known kind.
    """

    def __init__(self, target: Target | ChatTokenizer, config: RespondConfig):
        self.target, self.config = target, config
        self.servers = [connect(url, len(target.tokenizer)) for url in config.server]
        self.left_out: Counter[str] = Counter()
        """Prompts without an answer, by the reason."""

    @property
    def described(self) -> list[dict[str, str | None]]:
        """Say which engine serves which model, without addresses, which may change."""
        return [dict(pairs) for pairs in dict.fromkeys(tuple(_describe(server).items()) for server in self.servers)]

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
        """Yield the answers as they come.

        Raises:
            ValueError: the last server was given up, a server refuses every request, or sends what is no answer.
        """
        jobs = [_Job(Conversation(self.target, prompt, self.config)) for prompt in prompts]
        for server in self.servers if jobs else ():
            with contextlib.suppress(Unavailable):  # which is asked again
                _try_out(server, jobs[0])
        board = _Board(jobs)
        sites = [_Site(server, board, self.config, self.left_out) for server in self.servers]
        board.num_sites = len(sites)
        for site in sites:
            for _ in range(min(self.config.batch_size, len(jobs))):
                threading.Thread(target=site.work, daemon=True).start()  # ends with the process, whatever it waits for
        try:
            yield from board.results()
        finally:
            board.stop()


def _try_out(server: Server, job: "_Job") -> None:
    """Ask for one token after the first one of a prompt, which a server that works gives for any prompt."""
    server.answer_whole(job.conversation.ask()[:1], 1, 0.0, 0)


def _describe(server: Server) -> dict[str, str | None]:
    return {"engine": server.engine, "model": server.model and server.address.words(server.model)}


class _Job:
    """A prompt on its way."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.reasons: list[str] = []
        """Why each answer ended."""
        self.first_failure, self.num_failures = 0.0, 0


class _Board:
    """The prompts that wait and the answers that came, for all threads."""

    def __init__(self, jobs: Sequence[_Job]):
        self.waiting, self.num_open, self.num_sites = deque(jobs), len(jobs), 0
        self.num_jobs = len(jobs)
        self.delayed: list[tuple[float, int, _Job]] = []
        self.numbers, self.changed, self.is_over = itertools.count(), threading.Condition(), threading.Event()
        self.came: queue.SimpleQueue[Row | BaseException | None] = queue.SimpleQueue()

    def next(self) -> _Job | None:
        """Wait for a prompt; None where none is left."""
        with self.changed:
            while self.num_open and not self.is_over.is_set():
                wait = self.delayed[0][0] - time.monotonic() if self.delayed else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self.delayed)[-1]
                if self.waiting:
                    return self.waiting.popleft()
                self.changed.wait(wait)
        return None

    def put_back(self, job: _Job, seconds: float = 0.0) -> None:
        """Let a prompt wait again, at least so long."""
        with self.changed:
            heapq.heappush(self.delayed, (time.monotonic() + seconds, next(self.numbers), job))
            self.changed.notify()

    def close(self, row: Row | None) -> None:
        """End a prompt, with its answer or without one."""
        with self.changed:
            self.num_open -= 1
            self.came.put(row)
            if not self.num_open:
                self.changed.notify_all()

    def give_up_site(self, error: Unavailable, seconds: float) -> None:
        """Go on with one server less; without any, end."""
        with self.changed:
            self.num_sites -= 1
        if not self.num_sites:
            kept = "finished answers are kept: run the same command to go on"
            self.stop(ValueError(f"{error}; it was asked again for {seconds:g} seconds; {kept}"))

    def stop(self, error: BaseException | None = None) -> None:
        """Let no thread take another prompt."""
        with self.changed:
            self.is_over.set()
            self.came.put(error)
            self.changed.notify_all()

    def results(self) -> Iterator[list[Row]]:
        """Yield what came since the last time, until all prompts are ended."""
        left = self.num_jobs  # and not those still open: the threads may have answered some by now
        while left:
            found = [self.came.get()]
            while not self.came.empty():
                found.append(self.came.get())
            left -= len(found)
            if rows := [one for one in found if isinstance(one, tuple)]:
                yield rows
            for one in found:
                if isinstance(one, BaseException):
                    raise one


class _Site:
    """One server, as its threads see it."""

    def __init__(self, server: Server, board: _Board, config: RespondConfig, left_out: Counter[str]):
        self.server, self.board, self.config, self.left_out = server, board, config, left_out
        self.rest_until, self.is_given_up = 0.0, False
        self.failing_since = 0.0
        """When the failures began that no answer has come after; 0 where there is none."""

    def work(self) -> None:
        """Answer prompts until none is left or the server is given up; a thread's work."""
        num_failures = 0  # of this thread, one after the other
        while job := self.board.next():
            rest = self.rest_until - time.monotonic()
            if self.is_given_up or rest > 0:
                self.board.put_back(job)
                if self.is_given_up:
                    return
                self.board.is_over.wait(rest)
                continue
            try:
                self._ask(job)
                num_failures = 0
            except Unavailable as error:
                num_failures += 1
                self.board.is_over.wait(self._retry(job, error, num_failures))
            except NotItsTokens as error:
                self._leave_out(job, str(error), str(error))
            except Refused as error:
                if error.status in OF_PROMPT:
                    self._leave_out(job, f"refused by the server with status {error.status}", str(error))
                else:
                    self.board.stop(error)
            except BaseException as error:
                self.board.stop(error)

    def _ask(self, job: _Job) -> None:
        """Answer the turns of a prompt that have no answer yet."""
        conversation, config = job.conversation, self.config
        while not conversation.is_answered:
            token_ids = conversation.ask()
            answer = self.server.answer_whole(token_ids, config.max_new_tokens, config.temperature, conversation.seed)
            self.failing_since = 0.0
            tokens, reason = tokens_of_answer(answer, token_ids, conversation.target, config.max_new_tokens)
            conversation.add(token_ids, tokens)
            job.reasons.append(reason)
        self.board.close((conversation.response, {**_describe(self.server), "finish_reasons": job.reasons}))

    def _retry(self, job: _Job, error: Unavailable, num_failures: int) -> float:
        """Put a prompt back, leave it out, or give the server up; give the seconds for the thread to wait."""
        now, limit = time.monotonic(), self.config.retry_seconds
        job.first_failure, job.num_failures = job.first_failure or now, job.num_failures + 1
        self.failing_since = self.failing_since or now
        left = limit - (now - job.first_failure)
        is_over = now - self.failing_since >= limit
        works = (left <= 0 or is_over) and self._works(job)
        if works:
            self.failing_since = 0.0
        if left <= 0 and works:
            self._leave_out(job, "the server fails for it, and not for others", str(error))
            return 0.0
        if is_over and not works:
            job.first_failure, job.num_failures = 0.0, 0
            self.board.put_back(job)
            if not self.is_given_up:
                self.is_given_up = True
                self.board.give_up_site(error, limit)
            return 0.0
        longest = max(left, limit - (now - (self.failing_since or now)))
        if error.retry_after:
            self.rest_until = max(self.rest_until, now + min(error.retry_after, longest))
        self.board.put_back(job, min(_wait(job.num_failures), longest))
        return min(_wait(num_failures), longest)

    def _works(self, job: _Job) -> bool:
        """Try out whether the server fails or this prompt."""
        try:
            _try_out(self.server, job)
        except ValueError:
            return False
        return True

    def _leave_out(self, job: _Job, reason: str, detail: str) -> None:
        """End a prompt without an answer; the first one of each reason is told at once."""
        with self.board.changed:
            self.left_out[reason] += 1
            is_first = self.left_out[reason] == 1
        if is_first:
            print(printable(f"prompt {job.conversation.prompt.id} is left out: {detail}"), file=sys.stderr)
        self.board.close(None)


def _wait(num_failures: int) -> float:
    """Give the seconds until the next attempt."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(num_failures - 1, 10)) * random.uniform(0.5, 1.0)
