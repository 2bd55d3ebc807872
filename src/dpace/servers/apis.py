"""Ask a running server one prompt, and refuse what is no answer to it."""

import contextlib
import json
import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import PurePath
from typing import Any, NoReturn

import numpy as np

from dpace.servers.transport import Address, Unavailable

BROKEN = (KeyError, TypeError, AttributeError, IndexError, OverflowError, ValueError)
"""What reading a reply raises that is not what the engine sends."""
UNNAMED = "gpt-3.5-turbo"
"""How llama.cpp calls a model that has no name."""


@dataclass(frozen=True)
class Counts:
    """Verifications that a server reports."""

    num_verifications: int
    num_accepted: int
    """Draft tokens."""
    histogram: list[int] | None = None
    """Verifications by accepted length, where the server tells more than the sum."""

    def __add__(self, other: "Counts") -> "Counts":
        """Pool."""
        histogram = None
        if self.histogram and other.histogram:
            longest = max(len(self.histogram), len(other.histogram))
            pairs = (np.pad(h, (0, longest - len(h))) for h in (self.histogram, other.histogram))
            histogram = np.sum(list(pairs), 0).tolist()
        return Counts(
            self.num_verifications + other.num_verifications, self.num_accepted + other.num_accepted, histogram
        )

    def __sub__(self, before: "Counts") -> "Counts":
        """What came after an earlier reading of the same counters."""
        histogram = None
        if self.histogram:
            old = (before.histogram or []) + [0] * (len(self.histogram) - len(before.histogram or []))
            histogram = [a - b for a, b in zip(self.histogram, old, strict=True)]
        return Counts(
            self.num_verifications - before.num_verifications, self.num_accepted - before.num_accepted, histogram
        )

    @staticmethod
    def pooled(parts: Sequence["Counts"]) -> "Counts | None":
        """All together; None without any."""
        return reduce(operator.add, parts) if parts else None


@dataclass(frozen=True)
class Answer:
    """One response of a server."""

    token_ids: list[int]
    first_seconds: float
    """From the request to its first token."""
    seconds: float
    """From the request to its last token."""
    counts: Counts | None = None
    """Where the response itself has them."""
    reason: str = "done"
    """Why it ended, in the server's word: `stop`, `length`, `eos` or `limit`; `done` where it does not say."""
    text: str | None = None
    """The text, where a server that answers in one piece gives no tokens."""
    num_tokens: int | None = None
    """Number of tokens that the server says it has written; None where it does not say."""
    stop_token: int | None = None
    """Token that ended the text, where the server names it."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop token ended the text, and not its length."""
        return self.reason in ("stop", "eos")

    @property
    def decode_tokens(self) -> int:
        """Tokens after the first."""
        return max(0, len(self.token_ids) - 1)


class Server(ABC):
    """A running server; it always gets token ids, so that every engine sees the same prompt.

    Args:
        url: its address.
        vocab_size: tokens of the target's tokenizer; an answer has no others.
    """

    engine: str
    model: str | None = None
    """What the server calls its model, where it says so."""

    def __init__(self, url: str, vocab_size: int | None = None):
        self.address, self.vocab_size = Address(url), vocab_size
        self.url = self.address.url

    @abstractmethod
    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
        """Path and body of a streamed request for plain sampling at a temperature, without any filter."""

    @abstractmethod
    def read(self, event: dict, token_ids: list[int]) -> Counts | None:
        """Add an event's tokens to those so far; counts where the event has them."""

    @abstractmethod
    def end(self, event: dict) -> str | None:
        """Give the reason why the answer ends with this event; None where it goes on."""

    @abstractmethod
    def text(self, event: dict) -> tuple[str, int | None, int | None]:
        """Give text, number of tokens and stop token of an answer in one piece, each None if not told."""

    def counters(self) -> Counts | None:
        """All verifications since the server began, for servers whose responses tell nothing."""
        return None

    def answer(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> Answer:
        """Send one prompt and read its response, token by token, to the end.

        Raises:
            Refused: the server refuses the request.
            Unavailable: it does not answer, or breaks off.
            ValueError: it sends no token, more than asked or one outside the vocabulary, or answers with another model.
        """
        path, body = self.request(token_ids, max_new_tokens, temperature, seed)
        started, first, last, counts, response, reason = time.perf_counter(), None, 0.0, None, [], None
        with contextlib.closing(self.address.events(path, body, max_new_tokens)) as events:
            for event in events:
                if event is None:
                    reason = reason or "done"
                    break
                with self._reading(event):
                    counts, reason = self.read(event, response) or counts, self.end(event) or reason
                if len(response) > max_new_tokens:
                    self._refuse_length(len(response), max_new_tokens)
                if response:
                    last = time.perf_counter() - started
                    first = first or last
        reason = self._check_end(reason, len(response))
        if first is None:
            self._refuse_silence(token_ids)
        self._check_tokens(response)
        return Answer(response, first or last, last, counts, reason)

    def answer_whole(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> Answer:
        """Send one prompt and read its response in one piece, which is less work for both sides.

        Raises:
            Refused, Unavailable, ValueError: as `answer`. A text without tokens is an answer.
        """
        path, body = self.request(token_ids, max_new_tokens, temperature, seed)
        started, response = time.perf_counter(), []
        event = self.address.post(path, body | {"stream": False}, max_new_tokens)
        seconds = time.perf_counter() - started
        with self._reading(event):
            counts, reason = self.read(event, response), self.end(event)
            text, num_tokens, stop_token = self.text(event)
        num_found = len(response) or num_tokens or 0
        if num_found > max_new_tokens:
            self._refuse_length(num_found, max_new_tokens)
        reason = self._check_end(reason, num_found)
        if not response and not text and not num_tokens:
            self._refuse_silence(token_ids)
        self._check_tokens(response)
        told = {"text": None if response else text, "num_tokens": num_tokens, "stop_token": stop_token}
        return Answer(response, seconds, seconds, counts, reason, **told)

    @contextlib.contextmanager
    def _reading(self, event: dict) -> Iterator[None]:
        """Check which model answers, and turn what is no answer into one line."""
        try:
            self._check_model(event)
            yield
        except BROKEN as error:
            say = self.address.words
            raise ValueError(
                f"{self.url} sent {say(json.dumps(event))}, which {self.engine} does not send ({say(error)}); see the "
                "server's log, and which version runs"
            ) from error

    def _check_end(self, reason: str | None, num_tokens: int) -> str:
        """Refuse an answer that has no end, or that the server gave up."""
        if reason is None:
            raise Unavailable(
                f"{self.url} broke off after {num_tokens} tokens, without the mark of the end; is the server still "
                "running?"
            )
        if reason in ("abort", "error"):
            raise Unavailable(f"{self.url} ended its answer with {reason!r}; see the server's log")
        return reason

    def _refuse_length(self, found: int, expected: int) -> NoReturn:
        raise ValueError(
            f"{self.url} sent {found} tokens, expected at most {expected}, as it was asked for; see which version runs"
        )

    def _refuse_silence(self, prompt: Sequence[int]) -> NoReturn:
        raise ValueError(f"{self.url} sent no token for a prompt of {len(prompt)} tokens; see the server's log")

    def _check_model(self, event: dict) -> None:
        """Refuse an answer of another model than the one that was found, or that answered first."""
        found = event.get("model")
        if found is None or found == UNNAMED:
            return
        self.model = self.model or text_of(found)
        if found not in (self.model, PurePath(self.model).name):
            raise ValueError(f"the answer is of the model {found!r}, expected {self.model!r}")

    def _check_tokens(self, response: list[Any]) -> None:
        """Refuse tokens that the target does not have."""
        for token in response:
            if type(token) is not int or token < 0 or (self.vocab_size is not None and token >= self.vocab_size):
                raise ValueError(
                    f"{self.url} sent the token {self.address.words(token)}, expected one in 0 .. "
                    f"{(self.vocab_size or 0) - 1}; it serves another model than --target"
                )


def text_of(value: object) -> str:
    """Give a value that has to be text and not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"found {value!r}, expected a name")
    return value


def told(value: object, kind: type) -> Any:
    """Give a value that has to be of a type, or is not there."""
    if value is not None and type(value) is not kind:
        raise ValueError(f"found {value!r}, expected {kind.__name__}")
    return value


def number_of(value: object) -> int:
    """Give a value that has to be a count."""
    if type(value) is not int or value < 0:
        raise ValueError(f"found {value!r}, expected a count")
    return value


def tokens_of(value: object) -> list[Any]:
    """Give a value that has to be a list, of tokens that are checked later; None is an empty one."""
    if value is not None and not isinstance(value, list):
        raise ValueError(f"found {value!r}, expected a list of tokens")
    return value or []


def histogram_of(value: object) -> list[int] | None:
    """Give a value that has to be a list of counts, or is not there."""
    if value is not None and not isinstance(value, list):
        raise ValueError(f"found {value!r}, expected a list of counts")
    return [number_of(count) for count in value] if value else None
