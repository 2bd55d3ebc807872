"""Requests to servers that may be slow, endless, broken or elsewhere: bounded in time and size."""

import base64
import contextlib
import http.client
import json
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, NoReturn

from dpace.progress import printable

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


class Refused(ValueError):
    """The server answered, with an HTTP status that is no success."""


class Address:
    """A server's address; its password is sent, and is neither shown nor kept.

    Raises:
        ValueError: no `http://host:port`.
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
        if parts.username is not None:
            words = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"

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

    def _event(self, path: str, data: bytes) -> dict:
        """Read an event."""
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.url}{path} sent an event that is not JSON ({words(data)}); see the server's log"
            ) from error
        if not isinstance(event, dict):
            raise ValueError(f"{self.url}{path} sent {words(data)}, expected an object; see the server's log")
        if event.get("error"):
            raise ValueError(f"{self.url}{path} answers with the error {words(event['error'])}")
        return event


def words(value: object) -> str:
    """Repeat what a server said: short, in one line and without control characters."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return printable(" ".join(text[: 2 * MAX_SHOWN].split()))[:MAX_SHOWN]


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the same host only: another one would get the prompts."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """See `HTTPRedirectHandler`."""
        old, new = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            place = f"{new.scheme}://{new.netloc.rpartition('@')[2]}"
            raise ValueError(
                f"{req.full_url} leads to another host, {words(place)}, which is not followed; give that address if "
                "it is the server"
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


def _opener(clock: _Clock) -> urllib.request.OpenerDirector:
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

    return urllib.request.build_opener(Http, Https, _SameHost)


@contextlib.contextmanager
def _reading(address: Address, path: str, seconds: float, *, silence: float, body: dict | None = None) -> Iterator[Any]:
    """Open an address, and turn all that can go wrong while it is read into one line."""
    url, data = address.url + path, None if body is None else json.dumps(body).encode()
    headers = {**address.headers, **({"Content-Type": "application/json"} if data else {})}
    with _Clock(seconds) as clock:
        try:
            request = urllib.request.Request(url, data, headers)
            with _opener(clock).open(request, timeout=silence) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            _refused(url, error)
        except (OSError, http.client.HTTPException) as error:
            reason = words(getattr(error, "reason", None) or error or type(error).__name__)
            if data is not None and not isinstance(error, urllib.error.URLError):
                reason = f"{url} broke off ({reason}); is the server still running?"
            else:
                reason = f"nothing answers at {url} ({reason}); start the server, or correct the address"
            raise ValueError(_late(url, seconds) if clock.is_over else reason) from error
        if clock.is_over:
            raise ValueError(_late(url, seconds))


def _late(url: str, seconds: float) -> str:
    return f"{url} was not done after {seconds:,.0f} seconds; see the server's log"


def _refused(url: str, error: urllib.error.HTTPError) -> NoReturn:
    """Say what a server said when it refused."""
    try:
        said = words(error.read(2 * MAX_SHOWN))
    except (OSError, http.client.HTTPException):
        said = ""
    raise Refused(f"{url} refuses ({error.code}): {said or words(error.reason)}") from error
