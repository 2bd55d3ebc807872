"""A stub that speaks as llama.cpp's server does, and waits before it answers; `benchmarks/respond.py` starts it."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def serve_stub(seconds: float) -> None:
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


if __name__ == "__main__":
    serve_stub(float(sys.argv[1]))
