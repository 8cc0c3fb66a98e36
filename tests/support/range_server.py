"""A small HTTP server on the loopback that knows byte ranges and can be told to misbehave."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RangeServer:
    """Serves `files`; every attribute may be changed between requests.

    Attributes:
        files: path (with leading slash) -> content.
        drop_after: lengths after which the next responses are cut off, one taken per request.
        ranges: whether Range requests are honoured.
        validators: whether an ETag is sent.
        status: answer every request with this status instead.
        redirect: send every request there.
        requests: the Range header of every request so far (None without).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.drop_after: list[int] = []
        self.ranges = True
        self.validators = True
        self.status: int | None = None
        self.redirect: str | None = None
        self.requests: list[str | None] = []
        self.url = ""


@contextmanager
def serve() -> Iterator[RangeServer]:
    """Runs a server on a free port until the block ends."""
    state = RangeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requests.append(wanted)
            data = state.files.get(self.path)
            if state.redirect is not None:
                self._answer(302, {"Location": state.redirect}, b"")
                return
            if state.status is not None or data is None:
                self._answer(state.status or 404, {}, b"")
                return
            etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            headers = {"ETag": etag} if state.validators else {}
            start = 0
            condition = self.headers.get("If-Range")
            if state.ranges and wanted is not None and condition in (None, etag):
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    self._answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
                    return
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206 if start else 200, headers, data[start:])

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if state.drop_after and body:
                self.wfile.write(body[: state.drop_after.pop(0)])
                self.close_connection = True
                return
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
