"""A server in this process, whose pages and answers are functions of a test."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """A request: `path`, `headers`, and the `body` of a POST."""

    def log_message(self, *_):
        pass

    def send(self, body, status: int = 200, headers: dict | None = None) -> None:
        """Send bytes as they are, and another value as JSON."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_GET(self):
        self.server.get(self)

    def do_POST(self):
        stub = self.server
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.requests.append(self)
            stub.running += 1
            stub.most_running = max(stub.most_running, stub.running)
        try:
            stub.post(self)
        finally:
            with stub.lock:
                stub.running -= 1


class StubServer(ThreadingHTTPServer):
    """A server that runs until `close`; `get` and `post` answer a request by `send`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, get: Callable[[Handler], None], post: Callable[[Handler], None]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.get = get
        self.post = post
        self.lock = threading.Lock()
        self.requests: list[Handler] = []
        self.running = 0
        self.most_running = 0
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


PAGES = {
    "vllm": {
        "/server_info": {"vllm_config": "c"},  # in its developer mode
        "/version": {"version": "1"},
        "/v1/models": {"data": [{"id": "m"}]},
    },
    "sglang": {"/get_server_info": {"model_path": "m"}},
    "llama.cpp": {"/props": {"model_alias": "m"}},
}
"""What each engine tells of itself."""


def pages(known: dict) -> Callable[[Handler], None]:
    """Answer a GET with its page, and others with 404."""

    def get(handler: Handler) -> None:
        page = known.get(handler.path)
        handler.send(page or {}, 200 if page else 404)

    return get
