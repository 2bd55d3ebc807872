"""Requests to servers that may be slow, endless, broken or elsewhere: bounded in time and size.

An address and a request come in; a page, an answer or its events go out, or one line that tells what went wrong.
"""

import base64
import contextlib
import email.utils
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, NoReturn
from urllib.parse import unquote

import httpx

from dpace.system.progress import one_line

TIMEOUT_SECONDS = 600.0
"""Longest silence of a server: a long prompt on a CPU takes minutes until the first token."""
SECONDS_PER_TOKEN = 5.0
"""Seconds for each token asked for, beside `TIMEOUT_SECONDS`, until an answer must be complete; no server is slower."""
PAGE_SECONDS = 30.0
"""Until a page such as `/metrics` must be complete; servers write them from memory."""
MAX_RESPONSE_BYTES = 2**30
"""Most bytes of an answer. SGLang repeats in each event all that came before, which is half of that at 8192 tokens."""
MAX_PAGE_BYTES = 2**24
"""Most bytes of a page and of one line; the pages of servers have some hundred thousand."""
MAX_SHOWN = 300
"""Most characters of a server's text that a message repeats."""
API_KEY = "DPACE_API_KEY"
"""Environment variable with the key that servers ask for; it is sent, and is neither shown nor kept."""
RETRYABLE = (408, 425, 429, 500, 502, 503, 504, 529)
"""HTTP statuses of a server that may answer the same request later."""


class Refused(ValueError):
    """The server answered, with an HTTP status that is no success."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unavailable(ValueError):
    """The server does not answer now, and may answer the same request later."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the server asks to wait for; 0 where it does not say."""


class Address:
    """A server's address; its password, or the key in `API_KEY`, is sent, and is neither shown nor kept.

    No proxy is used: the environment's settings of httpx are not read, since prompts and the key are for this server.

    Raises:
        ValueError: no `http://host:port`, or a key that cannot be sent.
    """

    def __init__(self, url: str):
        url = url.strip()
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:  # whose message may show a password
            parsed = httpx.URL("")
        is_clean = url.isascii() and not set(" \\?#") & set(url)
        has_port = parsed.port is None or 0 < parsed.port < 2**16
        if parsed.scheme not in ("http", "https") or not parsed.host or not has_port or not is_clean:
            raise ValueError(
                "the server's address is none with a scheme, a host and a port alone; give http://host:port, without "
                "? and #"
            )
        self.url = str(parsed.copy_with(userinfo=b"")).rstrip("/")
        headers = {"Accept-Encoding": "identity"}
        self._secrets: list[str] = []
        if parsed.userinfo:
            login = base64.b64encode(unquote(parsed.userinfo.decode()).encode()).decode()
            self._secrets = [login, parsed.password, parsed.userinfo.decode().partition(":")[2]]
            headers["Authorization"] = f"Basic {login}"
        elif key := os.environ.get(API_KEY, "").strip():
            if not key.isascii() or not key.isprintable() or set(key) & set(" \"'\\"):
                raise ValueError(f"{API_KEY} has characters that no key has; set it to the key alone, without quotes")
            self._secrets = [key]
            headers["Authorization"] = f"Bearer {key}"
        # Each request has a connection of its own, whose socket the watchdog knows.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        own = ssl.create_default_context()  # this machine's certificates, not those that come with httpx
        self._client = httpx.Client(headers=headers, trust_env=False, verify=own, limits=limits)

    def short(self, value: object) -> str:
        """Return what the server said: short, in one line, without control characters, passwords and keys."""
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for secret in filter(None, self._secrets):
            text = text.replace(secret, "***")
        return one_line(text[: 2 * MAX_SHOWN])[:MAX_SHOWN]

    def get(self, path: str) -> str:
        """Read a page.

        Raises:
            Refused: the server has no such page.
            Unavailable: nothing answers, or not in time.
            ValueError: an answer without end.
        """
        with self._open(path, PAGE_SECONDS, MAX_PAGE_BYTES, silence=min(10.0, PAGE_SECONDS)) as chunks:
            return b"".join(chunks).decode(errors="replace")

    def events(self, path: str, body: dict, max_new_tokens: int) -> Generator[dict | None, None, None]:
        """Yield the server-sent events of a request with `stream`, and None for the mark of the end.

        Without `stream`, the answer is one event.

        Raises:
            Refused: the server refuses the request.
            Unavailable: it does not answer, or breaks off.
            ValueError: it sends what is no event, or sends without end.
        """
        most = min(MAX_RESPONSE_BYTES, 2**20 + 4096 * max_new_tokens + 24 * max_new_tokens**2)
        seconds = TIMEOUT_SECONDS + SECONDS_PER_TOKEN * max_new_tokens
        is_stream = body.get("stream", False)
        with self._open(path, seconds, most, silence=TIMEOUT_SECONDS if is_stream else seconds, body=body) as chunks:
            if not is_stream:
                yield self._event(path, b"".join(chunks))
                return
            for line in self._lines(path, chunks):
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    yield None
                    return
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

    def _lines(self, path: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Cut bytes into lines, of which none is longer than a page."""
        rest = b""
        for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            self._check_size(path, len(rest), MAX_PAGE_BYTES)
        yield rest

    def _check_size(self, path: str, size: int, most: int) -> None:
        if size > most:
            raise ValueError(
                f"{self.url}{path} sent {size:,} bytes and goes on, expected at most {most:,}; see the server's log, "
                "and whether it is the right server"
            )

    @contextlib.contextmanager
    def _open(
        self, path: str, seconds: float, most: int, *, silence: float, body: dict | None = None
    ) -> Iterator[Iterator[bytes]]:
        """Send a request, give the bytes of its answer, and turn all that can go wrong into one line.

        Args:
            path: of the page.
            seconds: from now to the end of the answer.
            most: bytes of the answer.
            silence: seconds between two bytes.
            body: is posted, where there is one.
        """
        url = f"{self.url}{path}"
        with _Watchdog(seconds) as watchdog:
            try:
                options: Any = {"timeout": silence, "extensions": {"trace": watchdog.trace}}
                request = self._client.build_request("POST" if body else "GET", url, json=body, **options)
                with contextlib.closing(self._client.send(request, stream=True)) as response:
                    if not response.is_success:
                        self._refuse(url, response)
                    yield self._chunks(path, response, most)
            except httpx.HTTPError as error:
                reason = self.short(str(error) or type(error).__name__)
                message = f"{url} broke off ({reason}); is the server still running?"
                if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    message = f"nothing answers at {url} ({reason}); start the server, or correct the address"
                if not watchdog.is_over:
                    raise Unavailable(message) from error
            if watchdog.is_over:
                raise Unavailable(f"{url} was not done after {seconds:,.0f} seconds; see the server's log")

    def _chunks(self, path: str, response: httpx.Response, most: int) -> Iterator[bytes]:
        """Yield the bytes of an answer as they come."""
        size = 0
        for chunk in response.iter_raw():
            size += len(chunk)
            self._check_size(path, size, most)
            yield chunk

    def _refuse(self, url: str, response: httpx.Response) -> NoReturn:
        """Raise what a server said when it refused.

        A redirect is a refusal too: another host would get the prompts.
        """
        if follow := response.next_request:
            raise ValueError(
                f"{url} leads to {self.short(follow.url.copy_with(userinfo=b''))}, which is not followed; give that "
                "address if it is the server"
            )
        text = b""
        with contextlib.suppress(httpx.HTTPError):
            text = next(response.iter_raw(), text)
        status = response.status_code
        message = f"{url} refuses ({status}): {self.short(text) or self.short(response.reason_phrase)}"
        if status in RETRYABLE:
            raise Unavailable(message, _retry_after(response.headers.get("Retry-After", "")))
        if status in (401, 403):
            message += f"; set {API_KEY} to the key that it wants"
        raise Refused(message, status)


class _Watchdog:
    """Ends a request when its time is over: httpx's limits are between two bytes, which may be many."""

    def __init__(self, seconds: float):
        self.is_over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Note the socket of a connection; httpx calls this at every step of a request."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
        if self.is_over:
            self._end()

    def _end(self) -> None:
        self.is_over = True
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "_Watchdog":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _retry_after(value: str) -> float:
    """Read seconds to wait, or a date to wait for (RFC 9110, 10.2.3); 0 where it is neither."""
    try:
        if value.isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
