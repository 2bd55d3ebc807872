"""A stand-in for the Hub: its public HTTP interface for datasets, over a folder of repositories."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 39 + "1"


class FakeHub(ThreadingHTTPServer):
    """Serves the files of `folder`/owner/name as dataset repositories."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, body: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200):
        self._send(json.dumps(value).encode(), status, Content_Type="application/json")

    def _answer(self):
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if parts[:2] == ["api", "datasets"]:
            repo, rest = self.server.folder / parts[2] / parts[3], parts[4:]
            if not repo.is_dir():
                return self._json({"error": "Repository not found"}, 404)
            entries = {path.relative_to(repo).as_posix(): path for path in sorted(repo.rglob("*"))}
            if rest[:1] == ["tree"]:
                under = "/".join(rest[2:])
                is_deep = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
                inside = {n: p for n, p in entries.items() if not under or n.startswith(under + "/")}
                depth = under.count("/") + 1 if under else 0
                return self._json([_entry(n, p) for n, p in inside.items() if is_deep or n.count("/") == depth])
            if rest[:1] == ["paths-info"]:
                asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
                return self._json([_entry(n, entries[n]) for n in asked if n in entries])
            names = [name for name, path in entries.items() if path.is_file()]
            siblings = [{"rfilename": name} for name in names]
            info = {"id": f"{parts[2]}/{parts[3]}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self._json({**info, "gated": False, "disabled": False, "downloads": 0, "likes": 0})
        if parts[:1] == ["datasets"] and "resolve" in parts:
            at = parts.index("resolve")
            path = self.server.folder.joinpath(*parts[1:at], *parts[at + 2 :])
            if not path.is_file():
                return self._send(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(content, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        return self._json({"error": "not found"}, 404)

    do_GET = do_HEAD = do_POST = _answer


def _entry(name: str, path: Path) -> dict:
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    content = path.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
