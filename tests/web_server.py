"""A web server on localhost that serves a few files, supports ranges, breaks connections and records requests."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Files by path. The next `cuts` responses end after `cut_after` bytes of the body."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts = 0
        self.cut_after = 1000
        self.ranges = True
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and range of each request."""
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the complete body for a path."""
        body = self.files.get(path.partition("?")[0])
        if body is None:
            return 404, {}, b"not here"
        return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body

    def is_cut(self, path: str, size: int) -> bool:
        """Whether to cut off the response. A response of at most `cut_after` bytes is never cut and does not count."""
        with self._lock:
            if self.cuts and size > self.cut_after:
                self.cuts -= 1
                return True
        return False


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve `site` at its `url` within a `with` block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(site))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler_of(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body_wanted=False)

        def do_GET(self) -> None:
            self._answer(body_wanted=True)

        def _answer(self, body_wanted: bool) -> None:
            wanted = self.headers.get("Range", "")
            site.requests.append((self.command, self.path, wanted))
            status, headers, body = site.answer(self.path)
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
            if status == 200 and span and site.ranges:
                start, end, size = int(span[1]), int(span[2] or len(body) - 1) + 1, len(body)
                if start >= size:
                    status, body = 416, b""
                else:
                    status, body = 206, body[start:end]
                    headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{size}"
            self.send_response(status)
            # One request per connection, so that no connection outlives the server.
            for name, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()
            if not body_wanted:
                return
            if status < 300 and site.is_cut(self.path, len(body)):
                self.wfile.write(body[: site.cut_after])
            else:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
