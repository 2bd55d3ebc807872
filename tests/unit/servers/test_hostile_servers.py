"""Hostile servers for `dpace bench --server`: one clear line, within a bounded time."""

import json
import threading
import time

import pytest

from dpace.cli import main
from tests.support.cases import wide
from tests.support.stub_server import StubServer

ESC = "\x1b[31m"
TOKEN = {"content": "x", "tokens": [5], "stop": False}
END = {"content": "", "tokens": [], "stop": True, "stop_type": "limit", "timings": {"predicted_n": 1}}


def send(body: bytes, status=200, **headers):
    return lambda handler: handler.send(body, status, {name.replace("_", "-"): v for name, v in headers.items()})


def events(*parts):
    lines = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts]
    return send(b"".join(b"data: " + line + b"\n\n" for line in lines))


def endless(part: bytes, *, pause: float = 0.0, head: bytes = b"HTTP/1.0 200 OK\r\n\r\n"):
    """Never ends, in the body or, with another beginning, in the header."""

    def reply(handler):
        try:
            handler.wfile.write(head)
            while True:
                handler.wfile.write(part)
                handler.wfile.flush()
                threading.Event().wait(pause)
        except OSError:
            return

    return reply


DRIPPED = {"part": b":", "pause": 0.05}
HEADER = b"HTTP/1.0 200 OK\r\nX-Never: "
ELSEWHERE = "http://u:secret@127.0.0.2:9/x"
RIGHT_PAGE = send(b'{"model_alias": "m"}')
REPLIES = {
    "nothing": (events(), "broke off after 0 tokens"),
    "only its end": (events(END), "no token"),
    "no end": (events(TOKEN, TOKEN), "broke off after 2 tokens"),
    "fewer bytes than promised": (send(b'data: {"tokens": [5]}\n\n', Content_Length="999"), "broke off"),
    "a token outside": (events({**TOKEN, "tokens": [64]}, END), "0 .. 63"),
    "tokens that are text": (events({**TOKEN, "tokens": "12"}, END), "llama.cpp does not send (tokens: "),
    "more than asked": (events(*[TOKEN] * 30, END), "sent 17 tokens, expected at most 16"),
    "another model": (events({**TOKEN, "model": "other"}, END), "'other', expected 'm'"),
    "an event that is a list": (events([1], END), "expected a JSON object"),
    "an event that is deep": (events(b"[" * 100_000, END), "expected a JSON object"),
    "an error": (events({"error": f"{ESC}no"}), "with the error"),
    "timings below zero": (
        events(TOKEN, {"stop": True, "timings": {"draft_n": -1, "predicted_n": 1, "draft_n_accepted": 0}}),
        "does not send (draft_n: ",
    ),
    "a prompt that was cut": (events(TOKEN, {"stop": True, "truncated": True}), "cut the prompt"),
    "a refusal": (send(f"{ESC}no".encode(), 400), "refuses (400)"),
    "a refusal without end": (endless(b"x" * 1000, head=b"HTTP/1.0 500 No\r\n\r\n"), "refuses (500)"),
    "bytes without end": (endless(b": \n" * 1000), "goes on"),
    "a line without end": (endless(b"x" * 1000), "goes on"),
    "a body byte by byte": (endless(**DRIPPED), "not done after"),
    "a header byte by byte": (endless(**DRIPPED, head=HEADER), "not done after"),
    "another place": (send(b"", 307, Location=ELSEWHERE), "leads to http://127.0.0.2:9/x, which is not followed"),
}

DEFAULT = (
    "no end",
    "a token outside",
    "more than asked",
    "an error",
    "a refusal",
    "a line without end",
    "another place",
)
"""Replies that the default tests send."""


@pytest.fixture
def start():
    """The address of a server of llama.cpp, or of what a test makes of it."""
    running = []

    def make(reply, page=RIGHT_PAGE):
        running.append(StubServer(page, reply))
        return running[-1].url.removeprefix("http://")

    yield make
    for server in running:
        server.close()


@pytest.fixture
def ask(language_folder, tmp_path, monkeypatch):
    """The command that measures a server; its bounds are those of a test."""
    monkeypatch.setattr("dpace.servers.transport.TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr("dpace.servers.transport.SECONDS_PER_TOKEN", 0.05)
    monkeypatch.setattr("dpace.servers.transport.PAGE_SECONDS", 1.0)
    monkeypatch.setattr("dpace.servers.transport.MAX_PAGE_BYTES", 2**18)
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"id": "h", "prompt": "w1 w2"}\n')
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "p", "prompt": "w3 w4"}\n')

    def command(address: str) -> list[str]:
        options = {"target": language_folder, "output": tmp_path / "out", "prompts.path": prompts}
        options |= {"prompts.heldout-path": heldout, "bench.server": address, "bench.max-new-tokens": 8}
        options |= {"bench.temperatures": "0"}
        return ["bench", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    return command


def refused(args: list[str], capsys, expected: str) -> None:
    """The verb ends soon with 1, and one line on stderr that shows no secret and does not steer a terminal.

    Not counted are those of the progress and of a tau that is missing.
    """
    started = time.monotonic()
    assert main(args) == 1
    assert time.monotonic() - started < 10
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("asking servers", "tau "))]
    assert len(lines) == 1 and lines[0].startswith("dpace bench: ") and expected in lines[0], err
    assert "secret" not in err and "\x1b" not in out + err


@pytest.mark.parametrize("fault", wide(REPLIES, *DEFAULT))
def test_what_is_no_answer_is_an_error(fault, start, ask, tmp_path, capsys):
    reply, expected = REPLIES[fault]
    refused(ask(f"http://user:secret@{start(reply)}"), capsys, expected)
    assert not (tmp_path / "out" / "servers.json").exists()


PAGES = {
    "a list": (send(b"[]"), "neither vLLM nor SGLang"),
    "deep": (send(b"[" * 100_000), "neither vLLM nor SGLang"),
    "without end": (endless(b"x" * 1000), "goes on"),
    "byte by byte": (endless(**DRIPPED), "not done after 1 seconds"),
    "another place": (send(b"", 301, Location="/login"), "/login, which is not followed"),
    "a hang": (lambda handler: threading.Event().wait(3), "/props"),
    "no HTTP": (lambda handler: handler.wfile.write(b"\x00\x01\x02\r\n\r\n"), "broke off"),
}


@pytest.mark.parametrize("fault", PAGES)
def test_what_is_no_server_is_an_error(fault, start, ask, capsys):
    page, expected = PAGES[fault]
    refused(ask(f"http://{start(events(TOKEN, END), page)}"), capsys, expected)


NO_ADDRESSES = [
    "127.0.0.1:9",
    "file:///etc/passwd",
    "http://user:secret",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:9?key=secret",
    "http://\u2024\u2024.invalid",
    f"http://a{ESC}b",
]
ADDRESSES = dict.fromkeys(NO_ADDRESSES, "give http://host:port")
ADDRESSES["http://user:secret@127.0.0.1:9"] = "nothing answers at http://127.0.0.1:9/props"


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_none_are_refused_and_show_no_password(address, ask, capsys):
    refused(ask(address), capsys, ADDRESSES[address])


def test_a_right_server_is_measured_without_a_proxy_and_its_password_is_not_kept(
    start, ask, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    seen = []

    def reply(handler):
        seen.append(handler.headers.get("Authorization"))
        events(TOKEN, END)(handler)

    command = ask(f"http://user:secret@{start(reply)}")
    assert main([*command, "--dry-run"]) == 0 and not seen
    assert main(command) == 0
    assert "secret" not in "".join(capsys.readouterr())
    assert set(seen) == {"Basic dXNlcjpzZWNyZXQ="}
    text = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "secret" not in text and "user" not in text and '"model": "m"' in text and "seed + i" in text
