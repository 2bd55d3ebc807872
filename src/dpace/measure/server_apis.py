"""Ask a running server in the API of its engine, and read what it reports of verifications."""

import json
import operator
import re
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

TIMEOUT_SECONDS = 600
"""Longest silence of a server."""


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

    @property
    def decode_tokens(self) -> int:
        """Tokens after the first."""
        return max(0, len(self.token_ids) - 1)


class Server(ABC):
    """A running server; it always gets token ids, so that every engine sees the same prompt."""

    engine: str

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @abstractmethod
    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
        """Path and body of a streamed request for plain sampling at a temperature, without any filter."""

    @abstractmethod
    def read(self, event: dict, token_ids: list[int]) -> Counts | None:
        """Add an event's tokens to those so far; counts where the event has them."""

    def counters(self) -> Counts | None:
        """All verifications since the server began, for servers whose responses tell nothing."""
        return None

    def answer(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> Answer:
        """Send one prompt and read its response to the end.

        Raises:
            ValueError: the server refuses, breaks off, or sends no token.
        """
        path, body = self.request(token_ids, max_new_tokens, temperature, seed)
        started, first, last, counts, response = time.perf_counter(), None, 0.0, None, []
        for event in _events(self.url + path, body):
            counts = self.read(event, response) or counts
            if response:
                last = time.perf_counter() - started
                first = first or last
        if first is None:
            raise ValueError(f"{self.url} sent no token for a prompt of {len(token_ids)} tokens; see the server's log")
        return Answer(response, first, last, counts)


class VllmServer(Server):
    """vLLM: `/v1/completions`, counters in `/metrics`.

    Source: its metrics `vllm:spec_decode_*`, https://docs.vllm.ai/en/latest/design/metrics.html.
    """

    engine = "vllm"

    def __init__(self, url: str):
        super().__init__(url)
        self.model = _get(self.url + "/v1/models")["data"][0]["id"]

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
            "stream": True,
            "return_token_ids": True,
        }
        return "/v1/completions", body

    def read(self, event, token_ids):
        """See `Server`."""
        for choice in event.get("choices", ()):
            token_ids += choice.get("token_ids") or []

    def counters(self):
        """See `Server`."""
        text = _get(self.url + "/metrics", is_json=False)

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
        }
        return "/generate", {"input_ids": list(token_ids), "sampling_params": sampling, "stream": True}

    def read(self, event, token_ids):
        """See `Server`."""
        meta, new = event.get("meta_info", {}), event.get("output_ids") or []
        if len(new) == meta.get(
            "completion_tokens"
        ):  # everything so far, unless the server was told to send the rest only
            token_ids.clear()
        token_ids += new
        if not meta.get("spec_verify_ct"):
            return None
        histogram = meta.get("spec_accept_histogram") or meta.get("spec_correct_drafts_histogram")
        accepted = meta.get("spec_accept_token_num", meta.get("spec_num_correct_drafts"))
        if accepted is None:
            accepted = meta["completion_tokens"] - 1 - meta["spec_verify_ct"]
        return Counts(meta["spec_verify_ct"], accepted, histogram)


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
        token_ids += event.get("tokens") or []
        timings = event.get("timings") or {}
        if not event.get("stop") or "draft_n" not in timings:
            return None
        emitted = timings["predicted_n"] - 1  # the first token is the prompt's
        verifications = max(1, emitted - timings["draft_n_accepted"])  # each emits what it accepts and one more
        if event.get("stop_type") == "eos" and timings["draft_n"] % verifications:
            # But not one whose draft ends the text. Drafts are equally long, so the number of tokens in them tells.
            verifications += timings["draft_n"] % (verifications + 1) == 0
        return Counts(verifications, max(0, emitted - verifications))


def connect(url: str) -> Server:
    """Find out what runs at an address.

    Raises:
        ValueError: nothing answers there, or none of the servers that are known.
    """
    url = url.rstrip("/")
    probes = (("/props", LlamacppServer), ("/get_server_info", SglangServer), ("/server_info", SglangServer))
    for path, kind in (*probes, ("/version", VllmServer)):
        try:
            answer = _get(url + path)
        except ValueError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError):
                continue  # a server, but not this one
            raise
        if isinstance(answer, dict) and (kind is not VllmServer or "version" in answer):
            return kind(url)
    raise ValueError(f"{url} is neither vLLM nor SGLang nor llama.cpp's server; give the address before /v1")


def _events(url: str, body: dict) -> Iterator[dict]:
    """The server-sent events of a request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as stream:
            for line in stream:
                data = line.decode().strip().removeprefix("data:").strip()
                if not line.startswith(b"data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(f"{url} answers: {event['error']}")
                yield event
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} refuses ({error.code}): {error.read().decode(errors='replace')[:300]}") from error
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{url} broke off ({error}); is the server still running?") from error


def _get(url: str, *, is_json: bool = True) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise ValueError(f"nothing answers at {url} ({error}); start the server, or mend the address") from error
    try:
        return json.loads(text) if is_json else text
    except json.JSONDecodeError:
        return None
