"""Requests to servers that may be slow, broken or elsewhere: bounded in time.

An address and a request come in; a page, an answer or its events go out, or one line that tells what went wrong.
"""

import contextlib
import json
import os
import ssl
import time
from collections.abc import Generator, Iterator

import httpx
from pydantic import HttpUrl, ValidationError

from dpace.system.progress import one_line

TIMEOUT_SECONDS = 600.0
"""Longest silence of a server: a long prompt on a CPU takes minutes until the first token."""
SECONDS_PER_TOKEN = 5.0
"""Seconds for each token asked for, beside `TIMEOUT_SECONDS`, until an answer must be complete; no server is slower."""
PAGE_SECONDS = 30.0
"""Until a page such as `/metrics` must be complete; servers write them from memory."""
MAX_SHOWN = 300
"""Most characters of a server's text that a message repeats."""
API_KEY = "DPACE_API_KEY"
"""Environment variable with the key that servers ask for; it is sent, and is neither shown nor kept."""


class Refused(ValueError):
    """The server answered, with an HTTP status that is no success."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unavailable(ValueError):
    """The server does not answer now, and may answer the same request later."""


class Address:
    """A server's address; the key in `API_KEY` is sent, and is neither shown nor kept.

    No proxy is used: the environment's settings of httpx are not read, since prompts and the key are for this server.

    Args:
        url: of the form that `dpace.config.Url` has.

    Raises:
        ValueError: a host or a port that none can have, or a key that cannot be sent.
    """

    def __init__(self, url: str):
        try:
            self.url = str(HttpUrl(url.strip())).rstrip("/")
        except ValidationError as error:
            raise ValueError(
                "a server's address has a host or a port that none can have; give http://host:port"
            ) from error
        self._key = os.environ.get(API_KEY, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(f"{API_KEY} has characters that no key has; set it to the key alone")
        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx.Client(
            headers=headers,
            trust_env=False,
            verify=ssl.create_default_context(),  # this machine's certificates, not those that come with httpx
            limits=httpx.Limits(
                max_keepalive_connections=0
            ),  # else a connection that the server closed fails a request
        )

    def short(self, value: object) -> str:
        """Return what the server said: short, in one line, without control characters and key."""
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        if self._key:
            text = text.replace(self._key, "***")
        return one_line(text[: 2 * MAX_SHOWN])[:MAX_SHOWN]

    def get(self, path: str) -> str:
        """Read a page.

        Raises:
            Refused: the server has no such page.
            Unavailable: nothing answers, or not in time.
        """
        with self._open(path, PAGE_SECONDS) as chunks:
            return b"".join(chunks).decode(errors="replace")

    def events(self, path: str, body: dict, max_new_tokens: int) -> Generator[dict, None, None]:
        """Yield the server-sent events of a request with `stream`, up to the mark of the end.

        Without `stream`, the answer is one event.

        Raises:
            Refused: the server refuses the request.
            Unavailable: it does not answer, or breaks off.
            ValueError: it sends what is no event.
        """
        with self._open(path, TIMEOUT_SECONDS + SECONDS_PER_TOKEN * max_new_tokens, body) as chunks:
            if not body.get("stream"):
                yield self._event(path, b"".join(chunks))
                return
            for line in _lines(chunks):
                name, _, data = line.partition(b":")
                if data.strip() == b"[DONE]":
                    return
                if line.startswith(b"{"):  # Ollama's events have no name
                    yield self._event(path, line)
                elif name == b"data":
                    yield self._event(path, data)

    def _event(self, path: str, data: bytes) -> dict:
        """Parse an event, or an answer in one piece."""
        event = None
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"{self.url}{path} sent {self.short(data)}, expected a JSON object; see the server's log")
        if event.get("error"):
            raise ValueError(f"{self.url}{path} answers with the error {self.short(event['error'])}")
        return event

    @contextlib.contextmanager
    def _open(self, path: str, seconds: float, body: dict | None = None) -> Iterator[Iterator[bytes]]:
        """Send a request, give the bytes of its answer, and turn all that can go wrong into one line.

        Args:
            path: of the page.
            seconds: to the end of the answer.
            body: is posted, where there is one.
        """
        url = f"{self.url}{path}"
        end = time.monotonic() + seconds
        silence = TIMEOUT_SECONDS if body and body.get("stream") else seconds
        try:
            with self._client.stream("POST" if body else "GET", url, json=body, timeout=silence) as response:
                if not response.is_success:
                    self._refuse(url, response)
                yield self._chunks(url, response, end)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unavailable(
                f"nothing answers at {url} ({self.short(error)}); start the server, or correct the address"
            ) from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{url} broke off ({self.short(error)}); is the server still running?") from error

    def _chunks(self, url: str, response: httpx.Response, end: float) -> Iterator[bytes]:
        """Yield the bytes of an answer as they come."""
        for chunk in response.iter_raw():
            if time.monotonic() > end:
                raise Unavailable(f"{url} was not done in time; see the server's log")
            yield chunk

    def _refuse(self, url: str, response: httpx.Response) -> None:
        """Raise what a server said when it refused.

        A redirect is a refusal too: another host would get the prompts.
        """
        status = response.status_code
        text = next(response.iter_raw(), b"")
        message = f"{url} refuses ({status}): {self.short(text) or self.short(response.reason_phrase)}"
        if status in (408, 429) or status >= 500:
            raise Unavailable(message)
        if status in (401, 403):
            message += f"; set {API_KEY} to the key that it wants"
        raise Refused(message, status)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut bytes into lines."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest
