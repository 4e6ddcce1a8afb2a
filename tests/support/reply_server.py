"""A web server that gives every request the same reply."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ReplyServer:
    """Answers every request with a fixed reply, and records what was asked."""

    def __init__(self) -> None:
        self.reply: tuple[int, str, str] = (200, "application/json", "{}")
        self.authorizations: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.authorizations.append(self.headers.get("Authorization") or "")
                status, content_type, text = outer.reply
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("ETag", '"e"')
                self.send_header("Last-Modified", "Sat, 28 Nov 2026 07:00:00 GMT")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text.encode())

            do_GET = do_POST = do_HEAD = _answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def reply_server() -> Iterator[ReplyServer]:
    """Run a server on loopback."""
    server = ReplyServer()
    thread = threading.Thread(target=server.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
        thread.join()
