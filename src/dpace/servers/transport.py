"""Requests to servers that may be slow, endless, broken or elsewhere: bounded in time and size."""

import base64
import contextlib
import email.utils
import http.client
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

from dpace.system.progress import printable

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
"""Most characters of a server's words that a message repeats."""
MAX_REFUSAL_BYTES = 2**13
"""Most bytes that are read of a refusal."""


API_KEY = "DPACE_API_KEY"
"""Environment variable with the key that servers ask for; it is sent, and is neither shown nor kept."""
PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
"""HTTP statuses of a server that may answer the same request later."""


class Refused(ValueError):
    """The server answered, with an HTTP status that is no success."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class Unavailable(ValueError):
    """The server does not answer now, and may answer the same request later."""

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the server asks to wait for; None where it does not say."""


class Address:
    """A server's address; its password, or the key in `API_KEY`, is sent, and is neither shown nor kept.

    Raises:
        ValueError: no `http://host:port`, or a key that cannot be sent.
    """

    def __init__(self, url: str):
        try:
            parts = urllib.parse.urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"the server's address cannot be read ({error}); give http://host:port") from error
        place = parts.netloc.rpartition("@")[2]
        clean = url.isprintable() and url.isascii() and " " not in place and "\\" not in place
        if parts.scheme not in ("http", "https") or not host or port == 0 or not clean:
            raise ValueError("the server's address is none with a scheme and a host; give http://host:port")
        if parts.query or parts.fragment:
            raise ValueError(f"the address of the server at {place} has ? or #; give http://host:port without them")
        self.url = f"{parts.scheme}://{place}{parts.path.rstrip('/')}"
        self.headers: dict[str, str] = {}
        self._secrets: list[str] = []
        if parts.username is not None:
            password = urllib.parse.unquote(parts.password or "")
            login = base64.b64encode(f"{urllib.parse.unquote(parts.username)}:{password}".encode()).decode()
            self._secrets = [login, password, parts.password or ""]
            self.headers["Authorization"] = f"Basic {login}"
        elif key := os.environ.get(API_KEY, "").strip():
            if not key.isascii() or not key.isprintable() or set(key) & set(" \"'\\"):
                raise ValueError(f"{API_KEY} has characters that no key has; set it to the key alone, without quotes")
            self._secrets = [key]
            self.headers["Authorization"] = f"Bearer {key}"

    def words(self, value: object) -> str:
        """Repeat what the server said: short, in one line, without control characters, passwords and keys."""
        return words(value, self._secrets)

    def get(self, path: str) -> str:
        """Read a page.

        Raises:
            Refused: the server has no such page.
            ValueError: nothing answers, or an answer without end.
        """
        with _reading(self, path, PAGE_SECONDS, silence=min(10.0, PAGE_SECONDS)) as answer:
            text = answer.read(MAX_PAGE_BYTES + 1)
            if len(text) > MAX_PAGE_BYTES:
                raise ValueError(f"{self.url}{path} has more than {MAX_PAGE_BYTES:,} bytes; is this the right server?")
            return text.decode(errors="replace")

    def events(self, path: str, body: dict, max_new_tokens: int) -> Generator[dict | None, None, None]:
        """Yield the server-sent events of a request, and None for the mark of the end.

        Raises:
            Refused: the server refuses the request.
            ValueError: it breaks off, sends what is no event, or sends without end.
        """
        most = min(MAX_RESPONSE_BYTES, 2**20 + 4096 * max_new_tokens + 24 * max_new_tokens**2)
        seconds, size = TIMEOUT_SECONDS + SECONDS_PER_TOKEN * max_new_tokens, 0
        with _reading(self, path, seconds, silence=TIMEOUT_SECONDS, body=body) as stream:
            while line := stream.readline(MAX_PAGE_BYTES + 1):
                size += len(line)
                if size > most or len(line) > MAX_PAGE_BYTES:
                    raise ValueError(
                        f"{self.url}{path} sent {size:,} bytes for {max_new_tokens} tokens and goes on, expected at "
                        f"most {min(most, MAX_PAGE_BYTES):,}; see the server's log"
                    )
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    yield None
                    return
                yield self._event(path, data)

    def post(self, path: str, body: dict, max_new_tokens: int) -> dict:
        """Send a request that is answered in one piece, as `events` does.

        Raises:
            Refused: the server refuses the request.
            Unavailable: it does not answer, or breaks off.
            ValueError: it sends what is no object, or sends without end.
        """
        most = 2**20 + 4096 * max_new_tokens
        seconds = TIMEOUT_SECONDS + SECONDS_PER_TOKEN * max_new_tokens
        with _reading(self, path, seconds, silence=seconds, body=body) as answer:
            text = answer.read(most + 1)
            if len(text) <= most and answer.length:  # of what was promised, this is missing
                raise http.client.IncompleteRead(text, answer.length)
        if len(text) > most:
            raise ValueError(f"{self.url}{path} sent more than {most:,} bytes for {max_new_tokens} tokens")
        return self._event(path, text)

    def _event(self, path: str, data: bytes) -> dict:
        """Read an event."""
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.url}{path} sent an event that is not JSON ({self.words(data)}); see the server's log"
            ) from error
        if not isinstance(event, dict):
            raise ValueError(f"{self.url}{path} sent {self.words(data)}, expected an object; see the server's log")
        if event.get("error"):
            raise ValueError(f"{self.url}{path} answers with the error {self.words(event['error'])}")
        return event


def words(value: object, secrets: Sequence[str] = ()) -> str:
    """Repeat what a server said: short, in one line and without control characters and secrets."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return printable(" ".join(text[: 2 * MAX_SHOWN].split()))[:MAX_SHOWN]


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the same host only: another one would get the prompts."""

    def __init__(self, address: Address):
        self.address = address

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """See `HTTPRedirectHandler`."""
        old, new = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            place = f"{new.scheme}://{new.netloc.rpartition('@')[2]}"
            raise ValueError(
                f"{req.full_url} leads to another host, {self.address.words(place)}, which is not followed; give that "
                "address if it is the server"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Clock:
    """Ends a connection when its time is over, even where the server sends a byte now and then."""

    def __init__(self, seconds: float):
        self.is_over, self._sockets = False, []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def connect(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> http.client.HTTPConnection:
        """Make a connection whose socket is known here."""
        connection, clock = kind(host, **options), self

        def connect() -> None:
            kind.connect(connection)
            clock._sockets.append(connection.sock)

        connection.connect = connect
        return connection

    def _end(self) -> None:
        self.is_over = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "_Clock":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _opener(clock: _Clock, address: Address) -> urllib.request.OpenerDirector:
    """Make what opens addresses, with redirects and time bounded."""

    class Http(urllib.request.HTTPHandler):
        """Opens `http`."""

        def http_open(self, req):
            """See `HTTPHandler`."""
            return self.do_open(partial(clock.connect, http.client.HTTPConnection), req)

    class Https(urllib.request.HTTPSHandler):
        """Opens `https`."""

        def https_open(self, req):
            """See `HTTPSHandler`."""
            return self.do_open(partial(clock.connect, http.client.HTTPSConnection), req)

    return urllib.request.build_opener(Http, Https, _SameHost(address))


@contextlib.contextmanager
def _reading(address: Address, path: str, seconds: float, *, silence: float, body: dict | None = None) -> Iterator[Any]:
    """Open an address, and turn all that can go wrong while it is read into one line."""
    url, data = address.url + path, None if body is None else json.dumps(body).encode()
    headers = {**address.headers, **({"Content-Type": "application/json"} if data else {})}
    with _Clock(seconds) as clock:
        try:
            request = urllib.request.Request(url, data, headers)
            with _opener(clock, address).open(request, timeout=silence) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            _refused(address, url, error)
        except (OSError, http.client.HTTPException) as error:
            reason = address.words(getattr(error, "reason", None) or error or type(error).__name__)
            if data is not None and not isinstance(error, urllib.error.URLError):
                reason = f"{url} broke off ({reason}); is the server still running?"
            else:
                reason = f"nothing answers at {url} ({reason}); start the server, or correct the address"
            raise Unavailable(_late(url, seconds) if clock.is_over else reason) from error
        if clock.is_over:
            raise Unavailable(_late(url, seconds))


def _late(url: str, seconds: float) -> str:
    return f"{url} was not done after {seconds:,.0f} seconds; see the server's log"


def _refused(address: Address, url: str, error: urllib.error.HTTPError) -> NoReturn:
    """Say what a server said when it refused."""
    try:
        said = address.words(error.read(MAX_REFUSAL_BYTES))
    except (OSError, http.client.HTTPException):
        said = ""
    message = f"{url} refuses ({error.code}): {said or address.words(error.reason)}"
    if error.code in PASSING:
        raise Unavailable(message, _retry_after(error.headers.get("Retry-After"))) from error
    if error.code in (401, 403):
        message += f"; set {API_KEY} to the key that it wants"
    raise Refused(message, error.code) from error


def _retry_after(value: str | None) -> float | None:
    """Read seconds to wait, or a date to wait for (RFC 9110, 10.2.3); None where it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else _seconds_until(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, seconds)


def _seconds_until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
