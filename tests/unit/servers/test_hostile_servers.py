"""Hostile servers for `dpace bench --server`: one clear line, within a bounded time."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpace.cli import main

ESC = "\x1b[31m"
TOKEN = {"content": "x", "tokens": [5], "stop": False}
END = {"content": "", "tokens": [], "stop": True, "stop_type": "limit", "timings": {"predicted_n": 1}}


class Broken(BaseHTTPRequestHandler):
    """llama.cpp's server, or what a test makes of it."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.page(self) if self.path == "/props" else self.send_error(404)

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.reply(self)


def send(body: bytes, status=200, **headers):
    def reply(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


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
    "a line that is cut": (events(TOKEN, b'{"tokens": [5'), "not JSON"),
    "fewer bytes than promised": (send(b'data: {"tokens": [5]}\n\n', Content_Length="999"), "broke off"),
    "a token outside": (events({**TOKEN, "tokens": [64]}, END), "0 .. 63"),
    "a token below zero": (events({**TOKEN, "tokens": [-1]}, END), "0 .. 63"),
    "a token that is true": (events({**TOKEN, "tokens": [True]}, END), "llama.cpp does not send (tokens.0: "),
    "tokens that are text": (events({**TOKEN, "tokens": "12"}, END), "llama.cpp does not send (tokens: "),
    "more than asked": (events(*[TOKEN] * 30, END), "sent 17 tokens, expected at most 16"),
    "another model": (events({**TOKEN, "model": "other"}, END), "'other', expected 'm'"),
    "an event that is a list": (events([1], END), "expected an object"),
    "an event that is deep": (events(b"[" * 100_000, END), "not JSON"),
    "an error": (events({"error": f"{ESC}no"}), "with the error"),
    "timings that are a text": (events(TOKEN, {"stop": True, "timings": "x"}), "does not send"),
    "timings without numbers": (events(TOKEN, {"stop": True, "timings": {"draft_n": 1}}), "does not send"),
    "timings below zero": (
        events(TOKEN, {"stop": True, "timings": {"draft_n": -1, "predicted_n": 1, "draft_n_accepted": 0}}),
        "does not send (draft_n: ",
    ),
    "a prompt that was cut": (events(TOKEN, {"stop": True, "truncated": True}), "cut the prompt"),
    "a page instead": (send(b"<html>"), "broke off"),
    "a refusal": (send(f"{ESC}no".encode(), 400), "refuses (400)"),
    "a refusal without end": (endless(b"x" * 1000, head=b"HTTP/1.0 500 No\r\n\r\n"), "refuses (500)"),
    "bytes without end": (endless(b": \n" * 1000), "goes on"),
    "a line without end": (endless(b"x" * 1000), "goes on"),
    "a body byte by byte": (endless(**DRIPPED), "not done after"),
    "a header byte by byte": (endless(**DRIPPED, head=HEADER), "not done after"),
    "another host": (send(b"", 302, Location=ELSEWHERE), "another host, http://127.0.0.2:9"),
    "another host, with the prompt": (send(b"", 307, Location=ELSEWHERE), "another host, http://127.0.0.2:9"),
}


@pytest.fixture
def start():
    running = []

    def make(reply, page=RIGHT_PAGE):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
        server.daemon_threads = True
        server.block_on_close = False
        server.reply = reply
        server.page = page
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield make
    for server in running:
        server.shutdown()
        server.server_close()


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
        options |= {"bench.concurrencies": "1", "bench.temperatures": "0"}
        return ["bench", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    return command


def refused(args: list[str], capsys, expected: str) -> None:
    """The verb ends soon with 1, and one line on stderr that shows no secret and does not steer a terminal."""
    started = time.monotonic()
    assert main(args) == 1
    assert time.monotonic() - started < 10
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("asking servers")]
    assert len(lines) == 1 and lines[0].startswith("dpace bench: ") and expected in lines[0], err
    assert "secret" not in err and "\x1b" not in out + err


@pytest.mark.parametrize("fault", REPLIES)
def test_what_is_no_answer_is_an_error(fault, start, ask, tmp_path, capsys):
    reply, expected = REPLIES[fault]
    refused(ask(f"http://user:secret@{start(reply)}"), capsys, expected)
    assert not (tmp_path / "out" / "servers.json").exists()


PAGES = {
    "a list": (send(b"[]"), "neither vLLM nor SGLang"),
    "no JSON": (send(b"<html>"), "neither vLLM nor SGLang"),
    "deep": (send(b"[" * 100_000), "neither vLLM nor SGLang"),
    "without end": (endless(b"x" * 1000), "goes on"),
    "byte by byte": (endless(**DRIPPED), "not done after 1 seconds"),
    "a header byte by byte": (endless(**DRIPPED, head=HEADER), "not done after 1 seconds"),
    "another host": (send(b"", 301, Location="https://127.0.0.2:9/props"), "another host"),
    "a circle": (send(b"", 302, Location="/props"), "leads to itself"),
    "a hang": (lambda handler: threading.Event().wait(3), "/props"),
    "no HTTP": (lambda handler: handler.wfile.write(b"\x00\x01\x02\r\n\r\n"), "broke off"),
}


@pytest.mark.parametrize("fault", PAGES)
def test_what_is_no_server_is_an_error(fault, start, ask, capsys):
    page, expected = PAGES[fault]
    refused(ask(f"http://{start(events(TOKEN, END), page)}"), capsys, expected)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:9",
        "file:///etc/passwd",
        "http://",
        "http://user:secret",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://127.0.0.1:9?key=secret",
        "http://user:secret@127.0.0.1:9",
        "http://127.0.0.1\r\nX: y",
        "http://\u2024\u2024.invalid",
        f"http://a{ESC}b",
    ],
)
def test_addresses_that_are_none_are_refused_and_show_no_password(address, ask, capsys):
    refused(ask(address), capsys, "http://")


def test_a_right_server_is_measured_without_a_proxy_and_its_password_is_not_kept(start, ask, tmp_path, monkeypatch):
    """Also after a redirect on the same host."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    seen = []

    def reply(handler):
        seen.append((handler.path, handler.headers.get("Authorization")))
        (events(TOKEN, END) if "moved" in handler.path else send(b"", 307, Location="/moved"))(handler)

    assert main(ask(f"http://user:secret@{start(reply)}")) == 0
    assert set(seen) == {(path, "Basic dXNlcjpzZWNyZXQ=") for path in ("/completion", "/moved")}
    text = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "secret" not in text and "user" not in text and '"model": "m"' in text and "seed + i" in text
