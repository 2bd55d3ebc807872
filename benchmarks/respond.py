"""Compare answers a second at several concurrencies, from a server that takes 50 ms for each.

    python benchmarks/respond.py [--seconds 0.05]

The server is a stub in a process of its own that speaks as llama.cpp does and waits before it answers, so that what is
measured is how `dpace respond --server` keeps requests on their way. The last column is the ratio to concurrency 1; it
is at least 6 at concurrency 8.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.answering import answer_prompts
from dpace.target.chat import ChatTokenizer

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
NUM_PROMPTS = {1: 40, 2: 80, 4: 160, 8: 320, 16: 640, 32: 1280}
NUM_TOKENS = 64


class Tokenizer:
    """As many tokens as letters; what tokenizing costs is not measured here."""

    chat_template = None

    def __len__(self):
        return 256

    def __call__(self, text, **_):
        """Encode."""
        return {"input_ids": list(text.encode())}

    def decode(self, token_ids, **_):
        """Decode."""
        return bytes(token_ids).decode()

    def get_vocab(self):
        """Return nothing that could differ."""
        return {}


def serve(seconds: float) -> None:
    """Serve until this process is ended; the first line has the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.send({"model_alias": "stub"})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(seconds)
            tokens = [65] * body["n_predict"]
            self.send({"content": "", "tokens": tokens, "stop": True, "stop_type": "limit"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.request_queue_size = 128
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def measure(url: str, concurrency: int) -> float:
    """Return answers a second."""
    count = NUM_PROMPTS[concurrency]
    prompts = [Prompt(str(i), "s", [[{"role": "user", "content": f"prompt {i}"}]]) for i in range(count)]
    config = RespondConfig(max_new_tokens=NUM_TOKENS, batch_size=concurrency, server=(url,))
    chat = ChatTokenizer("stub", Tokenizer(), stop_token_ids=[0])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        assert not answer_prompts(chat, prompts, Path(folder) / "responses.jsonl", config)
        return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.seconds)
    command = [sys.executable, __file__, "--serve", "--seconds", str(options.seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            measure(url, 1)  # what is loaded at the first use is not measured
            speeds = {concurrency: measure(url, concurrency) for concurrency in CONCURRENCIES}
        finally:
            process.kill()
    print("concurrency  answers/s  ratio")
    for concurrency, speed in speeds.items():
        print(f"{concurrency:11d} {speed:10.1f} {speed / speeds[1]:6.2f}")


if __name__ == "__main__":
    main()
