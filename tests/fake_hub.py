"""A Hub of two models, and a mirror of files, on this machine: what they answer is in the first part of the path."""

import hashlib
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL, MASK = "somebody/tiny-vit", "somebody/tiny-mask"
SLOW = 60  # seconds; a client that waits for the answer fails its test


class Answer(BaseHTTPRequestHandler):
    """`/hub/…` is a good Hub, `/mirror/…` a place with files that takes its time; `/slow/…` accepts and says nothing,
    `/drip/…` sends its answer a byte at a time, `/gone/…` has no such model, `/broken/…` is out of order."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        return  # not into the output of the tests

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        kind, _, path = self.path.lstrip("/").partition("/")
        self.server.asked[path] += 1
        if kind == "slow":
            self.server.closing.wait(SLOW)
        elif kind == "drip":
            for byte in b"HTTP/1.1 200 OK\r\nX-Filler: " + b"." * SLOW:
                if self.server.closing.wait(1):
                    break
                self.wfile.write(bytes([byte]))
        elif kind == "gone":
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif kind == "broken":
            self.reply(503, b"")
        elif kind == "mirror":
            time.sleep(0.3)  # long enough for a second process to come too early
            self.reply(200, (self.server.folder / path).read_bytes())
        else:
            model, known, name = path.partition("/resolve/main/")
            file = self.server.models.get(model, self.server.folder / "none") / name
            content = file.read_bytes() if known and file.is_file() else b""
            etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            missing = {"X-Error-Code": "EntryNotFound"}
            self.reply(200 if content else 404, content, etag if content else missing)

    def reply(self, status: int, content: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT, "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def fake_hub(folder: Path):
    """The server of a folder's files, which are also those of `MODEL`: `url`, and `asked`, how often for each path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads, server.folder, server.asked, server.closing = True, folder, Counter(), Event()
    server.models = {MODEL: folder}
    server.handle_error = lambda *args: None  # a client that hung up is no news
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
