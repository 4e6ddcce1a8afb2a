"""An HTTP server for a folder, for tests: GET and HEAD with ranges and ETags, and PUT.

It can require a password, or a signature in the query.

    with http_server(folder) as server:
        server.url("shards/a.tar")
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(kw_only=True)
class HttpServer:
    """A running server, and the requests that it received."""

    folder: Path
    port: int = 0
    ranges: bool = True
    """Whether range requests are supported; otherwise the whole file is returned."""
    password: str = ""
    """Required `user:password`; empty for none."""
    query: str = ""
    """Required query of every URL; empty for none."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and `Range` header of every request."""

    @property
    def endpoint(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    def url(self, path: str = "") -> str:
        """URL of a file or folder."""
        return f"{self.endpoint}/{path}".rstrip("/")


@contextmanager
def http_server(
    folder: Path, *, ranges: bool = True, password: str = "", query: str = ""
) -> Iterator[HttpServer]:
    """Serve `folder` on a free port."""
    server = HttpServer(folder=folder, ranges=ranges, password=password, query=query)
    handler = type("Handler", (_Handler,), {"served": server})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        server.port = running.server_address[1]
        thread = threading.Thread(
            target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        try:
            yield server
        finally:
            running.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: HttpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = self._path()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        self._send(201, b"")

    def _path(self) -> Path | None:
        """The requested file; None if the request was rejected."""
        url = urllib.parse.urlsplit(self.path)
        self.served.requests.append((self.command, url.path, self.headers.get("Range", "")))
        required = "Basic " + base64.b64encode(self.served.password.encode()).decode()
        if self.served.password and self.headers.get("Authorization") != required:
            self._send(401, b"unauthorized")
            return None
        if self.served.query and url.query != self.served.query:
            self._send(403, b"not signed")
            return None
        return self.served.folder / urllib.parse.unquote(url.path).lstrip("/")

    def _respond(self, *, with_body: bool) -> None:
        path = self._path()
        if path is not None:
            self._send(*self._read(path), with_body=with_body)

    def _read(self, path: Path) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of the response for a file or a range of it."""
        try:
            data, modified_ns = path.read_bytes(), path.stat().st_mtime_ns
        except OSError:
            return 404, b"not found", {}
        etag = hashlib.md5(f"{modified_ns} {len(data)}".encode()).hexdigest()
        headers = {"ETag": f'"{etag}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not (requested and self.served.ranges):
            return 200, data, headers
        first, last = int(requested[1]), min(int(requested[2] or len(data)), len(data) - 1)
        if first > last:
            return 416, b"", {"Content-Range": f"bytes */{len(data)}"}
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            with contextlib.suppress(OSError):  # the client may have disconnected
                self.wfile.write(body)
