"""Servers that are broken or hostile: one clear line, within a bounded time."""

import json
import threading
import time

import pytest

from dpace.servers.apis import connect
from dpace.servers.transport import Address
from tests.support.stub_server import StubServer

ESC = "\x1b[31m"
TOKEN = {"tokens": [5]}
END = {"stop": True, "stop_type": "limit"}


def send(body: bytes, status=200, **headers):
    return lambda handler: handler.send(body, status, headers)


def events(*parts):
    return send(b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts))


def endless(part: bytes, pause: float = 0.0, status: int = 200):
    def reply(handler):
        try:
            handler.wfile.write(f"HTTP/1.0 {status} X\r\n\r\n".encode())
            while True:
                handler.wfile.write(part)
                threading.Event().wait(pause)
        except OSError:
            return

    return reply


REPLIES = {
    "sent no token": events(END),
    "broke off after 2 tokens": events(TOKEN, TOKEN),
    "(abort)": events(TOKEN, END | {"stop_type": "abort"}),
    "/completion broke off": lambda handler: handler.send(b"data: {}\n", 200, {"Content-Length": "999"}),
    "0 .. 63": events({"tokens": [64]}, END),
    "llama.cpp does not send": events({"tokens": "12"}, END),
    "which llama.cpp does not send": events(TOKEN, END | {"timings": {"draft_n": 1}}),
    "sent 17 tokens, expected at most 16": events(*[TOKEN] * 30, END),
    "expected a JSON object": events([1], END),
    "with the error": events({"error": f"{ESC}no"}),
    "cut the prompt": events(TOKEN, END | {"truncated": True}),
    "refuses (400)": send(f"{ESC}no".encode(), 400),
    "refuses (422): ***": lambda handler: handler.send(handler.headers["Authorization"].split()[1].encode(), 422),
    "refuses (500)": endless(b"x" * 1000, status=500),
    "refuses (307)": send(b"", 307, Location="http://127.0.0.2:9/x"),
    "not done in time": endless(b"data: {}\n", 0.05),
}
DEEP = b"[" * 200_000


PAGES = {
    "neither vLLM nor SGLang": send(b"[]"),
    "nor llama.cpp's server": send(DEEP),
    "timed out": lambda handler: threading.Event().wait(2),
}


@pytest.fixture
def refused(monkeypatch):
    """Bounds are those of a test."""
    monkeypatch.setenv("DPACE_API_KEY", "secret")
    monkeypatch.setattr("dpace.servers.transport.TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("dpace.servers.transport.SECONDS_PER_TOKEN", 0.01)
    monkeypatch.setattr("dpace.servers.transport.PAGE_SECONDS", 0.3)

    def check(page, reply, expected: str) -> None:
        server = StubServer(page, reply)
        started = time.monotonic()
        with pytest.raises(ValueError) as error:
            connect(server.url, 64).answer([1, 2], 16, 0.0, 0)
        assert time.monotonic() - started < 5
        said = str(error.value)
        assert expected in said and "secret" not in said and "\x1b" not in said and "\n" not in said
        server.close()

    return check


@pytest.mark.parametrize("expected", REPLIES)
def test_what_is_no_answer_is_an_error(expected, refused):
    refused(send(b'{"model_alias": "m"}'), REPLIES[expected], expected)


@pytest.mark.parametrize("expected", PAGES)
def test_what_is_no_server_is_an_error(expected, refused):
    refused(PAGES[expected], events(TOKEN, END), expected)


@pytest.mark.parametrize("host", ["127.0.0.1:99999", "[1:2]:9"])
def test_addresses_that_no_host_has_are_refused(host):
    """Their form is that of an address, which the options check."""
    with pytest.raises(ValueError, match="give http://host:port"):
        Address(f"http://{host}")


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="nothing answers at http://127.0.0.1:9/props"):
        connect("http://127.0.0.1:9")
