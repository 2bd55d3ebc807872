"""Ask a running server one prompt, and refuse what is no answer to it.

How vLLM, SGLang and llama.cpp are asked, and what they report of verifications.
"""

import contextlib
import json
import operator
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import PurePath
from typing import Any, NoReturn

import numpy as np

from dpace.servers.transport import Address, Refused, Unavailable

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


MODEL_KEYS = ("model_alias", "served_model_name", "model_path")
"""Where llama.cpp and SGLang say which model they serve."""


class VllmServer(Server):
    """vLLM: `/v1/completions`, counters in `/metrics`.

    Source: its metrics `vllm:spec_decode_*`, https://docs.vllm.ai/en/latest/design/metrics.html.
    """

    engine = "vllm"

    def __init__(self, url: str, vocab_size: int | None = None):
        super().__init__(url, vocab_size)
        page = self.address.get("/v1/models")
        try:
            self.model = text_of(json.loads(page)["data"][0]["id"])
        except (*BROKEN, RecursionError) as error:
            raise ValueError(
                f"{self.url}/v1/models answers {self.address.words(page)}, expected a list of models; is it vLLM's "
                "server?"
            ) from error

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        body = {
            "model": self.model,
            "prompt": list(token_ids),
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "stream": True,
            "return_token_ids": True,
        }
        return "/v1/completions", body

    def read(self, event, token_ids):
        """See `Server`."""
        for choice in event.get("choices", ()):
            token_ids += tokens_of(choice.get("token_ids"))

    def end(self, event):
        """See `Server`."""
        found = (told(choice.get("finish_reason"), str) for choice in event.get("choices", ()))
        return next(filter(None, found), None)

    def text(self, event):
        """See `Server`."""
        (choice,), usage = event["choices"], event.get("usage") or {}
        stop = choice.get("stop_reason")  # a token's number, or a text to stop at; None for the end of the sequence
        return told(choice.get("text"), str) or "", told(usage.get("completion_tokens"), int), told(stop, int)

    def counters(self):
        """See `Server`."""
        text = self.address.get("/metrics")
        try:
            return self._read_counters(text)
        except BROKEN as error:
            raise ValueError(
                f"{self.url}/metrics has counters that cannot be read ({self.address.words(error)}); see which version "
                "runs"
            ) from error

    def _read_counters(self, text: str) -> Counts | None:
        """Find the counters of speculative decoding in the page."""

        def values(name: str) -> list[tuple[str, int]]:
            pattern = rf"^vllm:spec_decode_{name}_total(?:\{{([^}}]*)\}})? ([0-9.e+]+)$"
            found = re.findall(pattern, text, re.MULTILINE)
            return [(labels, round(float(value))) for labels, value in found]

        drafts = values("num_drafts")
        if not drafts:
            return None
        reached: dict[int, int] = {}
        for labels, value in values("num_accepted_tokens_per_pos"):
            position = re.search(r'position="(\d+)"', labels)
            if position:
                reached[int(position[1])] = reached.get(int(position[1]), 0) + value
        total = sum(value for _, value in drafts)
        reach = [total, *(reached[i] for i in sorted(reached)), 0]
        histogram = [a - b for a, b in zip(reach, reach[1:], strict=False)] if reached else None
        return Counts(total, sum(value for _, value in values("num_accepted_tokens")), histogram)


class SglangServer(Server):
    """SGLang: its native `/generate`, counts in `meta_info`.

    Source: `spec_verify_ct` and `spec_accept_histogram` of sgl-project/sglang.
    """

    engine = "sglang"

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "sampling_seed": seed,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        return "/generate", {"input_ids": list(token_ids), "sampling_params": sampling, "stream": True}

    def read(self, event, token_ids):
        """See `Server`."""
        meta, new = event.get("meta_info", {}), tokens_of(event.get("output_ids"))
        if len(new) == meta.get("completion_tokens"):
            token_ids.clear()  # the event has all so far, unless the server was told to send the rest only
        token_ids += new
        if not meta.get("spec_verify_ct"):
            return None
        verified = number_of(meta["spec_verify_ct"])
        histogram = histogram_of(meta.get("spec_accept_histogram") or meta.get("spec_correct_drafts_histogram"))
        accepted = meta.get("spec_accept_token_num", meta.get("spec_num_correct_drafts"))
        if accepted is None:
            accepted = max(0, number_of(meta["completion_tokens"]) - 1 - verified)
        return Counts(verified, number_of(accepted), histogram)

    def end(self, event):
        """See `Server`."""
        reason = event.get("meta_info", {}).get("finish_reason")
        return told(reason["type"] if isinstance(reason, dict) else reason, str)

    def text(self, event):
        """See `Server`."""
        meta = event.get("meta_info", {})
        reason = meta.get("finish_reason")
        stop = reason.get("matched") if isinstance(reason, dict) else None
        return told(event.get("text"), str) or "", told(meta.get("completion_tokens"), int), told(stop, int)


class LlamacppServer(Server):
    """llama.cpp: its native `/completion`, draft counts in `timings`.

    Source: `tools/server/README.md` of ggml-org/llama.cpp.
    """

    engine = "llama.cpp"

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        body = {
            "prompt": list(token_ids),
            "n_predict": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        return "/completion", body

    def read(self, event, token_ids):
        """See `Server`."""
        token_ids += tokens_of(event.get("tokens"))
        timings = event.get("timings") or {}
        if not isinstance(timings, dict):
            raise ValueError(f"timings is {timings!r}, expected an object")
        if not event.get("stop") or "draft_n" not in timings:
            return None
        for name in ("predicted_n", "draft_n", "draft_n_accepted"):
            number_of(timings[name])
        emitted = timings["predicted_n"] - 1  # the first token is the prompt's
        verifications = max(1, emitted - timings["draft_n_accepted"])  # each emits what it accepts and one more
        if event.get("stop_type") == "eos" and timings["draft_n"] % verifications:
            # But not one whose draft ends the text. Drafts are equally long, so the number of tokens in them tells.
            verifications += timings["draft_n"] % (verifications + 1) == 0
        return Counts(verifications, max(0, emitted - verifications))

    def end(self, event):
        """See `Server`."""
        if event.get("truncated"):
            raise ValueError("the server cut the prompt: give it a longer context")
        return (told(event.get("stop_type"), str) or "done") if event.get("stop") else None

    def text(self, event):
        """See `Server`."""
        return told(event.get("content"), str) or "", told(event.get("tokens_predicted"), int), None


def connect(url: str, vocab_size: int | None = None) -> Server:
    """Find out what runs at an address.

    Args:
        url: `http://host:port`; a user and a password in it are sent, and are not shown.
        vocab_size: see `Server`.

    Raises:
        ValueError: no address, nothing answers there, or none of the servers that are known.
    """
    address = Address(url)
    probes = (("/props", LlamacppServer), ("/get_server_info", SglangServer), ("/server_info", SglangServer))
    for path, kind in (*probes, ("/version", VllmServer)):
        try:
            answer = json.loads(address.get(path))
        except Refused:
            continue  # a server, but not this one
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(answer, dict) and (kind is not VllmServer or "version" in answer):
            server = kind(url, vocab_size)
            server.model = server.model or next(
                (v for k in MODEL_KEYS if isinstance(v := answer.get(k), str) and v), None
            )
            return server
    raise ValueError(f"{address.url} is neither vLLM nor SGLang nor llama.cpp's server; give the address before /v1")
