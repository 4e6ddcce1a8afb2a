"""An HTTP proxy that injects faults into responses, for tests of reading from object stores.

    with fault_proxy(server.port, fault_rate=0.1, seed=1) as proxy:
        ... read through proxy.endpoint ...
        print(proxy.fault_counts)

Whether and how a request fails is sampled from the seed and the number of the request. The `Host`
header is forwarded unchanged, so signed requests stay valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

FAULTS = (
    "500",
    "503",
    "429",
    "404",
    "html",
    "reset",
    "slow",
    "truncated",
    "wrong-length",
    "delayed",
    "bit-flip",
)
"""Error statuses; an HTML page with status 200; the connection reset, slowed to 10 B/s or closed
in the body; a wrong `Content-Length`; a response after `delay_seconds`; one flipped bit."""
_LOGIN_PAGE = b"<html><body>Please sign in to the network.</body></html>"


@dataclass(kw_only=True)
class FaultProxy:
    """A running proxy."""

    upstream: int
    """Port of the server on 127.0.0.1."""
    fault_rate: float
    """Fraction of requests with a fault."""
    seed: int = 0
    faults: Sequence[str] = FAULTS
    delay_seconds: float = 30.0
    path_filter: Callable[[str], bool] = lambda path: True
    """Faults are injected only for paths for which it is true."""
    port: int = 0
    requests: int = 0
    fault_counts: Counter[str] = field(default_factory=Counter)
    """Number of injected faults by kind."""
    max_connections: int = 0
    """Maximum number of simultaneous connections."""

    @property
    def endpoint(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    def next_fault(self, method: str, path: str) -> tuple[str, random.Random]:
        """The fault of the next request (empty for none), and its random generator."""
        self.requests += 1
        rng = random.Random(f"{self.seed} {self.requests}")
        has_fault = (
            rng.random() < self.fault_rate and method in ("GET", "HEAD") and self.path_filter(path)
        )
        fault = rng.choice(list(self.faults)) if has_fault else ""
        if fault:
            self.fault_counts[fault] += 1
        return fault, rng


@contextmanager
def fault_proxy(
    upstream: int,
    *,
    fault_rate: float,
    seed: int = 0,
    faults: Sequence[str] = FAULTS,
    delay_seconds: float = 30.0,
    path_filter: Callable[[str], bool] = lambda path: True,
) -> Iterator[FaultProxy]:
    """Run a proxy for the server at port `upstream`."""
    proxy = FaultProxy(
        upstream=upstream,
        fault_rate=fault_rate,
        seed=seed,
        faults=faults,
        delay_seconds=delay_seconds,
        path_filter=path_filter,
    )
    loop, ready = asyncio.new_event_loop(), threading.Event()
    end = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(_connection_handler(proxy), "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        ready.set()
        await end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


_Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _connection_handler(proxy: FaultProxy) -> _Handler:
    num_connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        proxy.max_connections = max(proxy.max_connections, num_connections)
        # Clients close connections in the middle of faulty responses.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await _one_request(proxy, reader, writer):
                pass
        num_connections -= 1
        writer.close()

    return handle


@dataclass
class _Response:
    """A response of the server."""

    status: bytes
    headers: dict[str, str]
    body: bytes

    def head(self) -> bytes:
        lines = [
            self.status.rstrip(),
            *(f"{name}: {value}".encode() for name, value in self.headers.items()),
        ]
        return b"\r\n".join(lines) + b"\r\n\r\n"


async def _one_request(
    proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Handle one request; False if the connection must be closed."""
    head = await reader.readuntil(b"\r\n\r\n")
    method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
    body = await reader.readexactly(int(_headers(head).get("content-length", "0")))
    fault, rng = proxy.next_fault(method, path)
    if fault == "delayed":
        await asyncio.sleep(proxy.delay_seconds)
    if fault in ("500", "503", "429", "404", "html"):
        response = _error_response(fault)
    else:
        response = await _forward(proxy.upstream, method, head, body)
    if method == "HEAD":
        writer.write(response.head() if fault != "reset" else b"HTTP/1.1 200")
        await writer.drain()
        return fault not in ("reset", "truncated")
    return await _send(writer, response, fault, rng)


async def _forward(port: int, method: str, head: bytes, body: bytes) -> _Response:
    """Forward a request to the server and return its response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first, _, rest = head.partition(b"\r\n")
    lines = [line for line in rest.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    try:
        writer.write(first + b"\r\nConnection: close\r\n" + b"\r\n".join(lines) + body)
        await writer.drain()
        while True:
            head_bytes = await reader.readuntil(b"\r\n\r\n")
            if not head_bytes.startswith((b"HTTP/1.1 100", b"HTTP/1.0 100")):
                break
        headers = _headers(head_bytes)
        data = b"" if method == "HEAD" else await _body(reader, headers)
    finally:
        writer.close()
    status, kept = head_bytes.split(b"\r\n", 1)[0], {}
    for name, value in headers.items():
        if name not in ("transfer-encoding", "connection"):
            kept[name] = value
    if method != "HEAD" and not status.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        kept["content-length"] = str(len(data))
    return _Response(status, kept, data)


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        chunks = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            chunks.append(await reader.readexactly(size))
            await reader.readline()
        return b"".join(chunks)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()


async def _send(
    writer: asyncio.StreamWriter, response: _Response, fault: str, rng: random.Random
) -> bool:
    """Send a response with a fault; False if the connection must be closed."""
    body, half = response.body, len(response.body) // 2
    match fault:
        case "bit-flip" if body:
            corrupt = bytearray(body)
            corrupt[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            body = bytes(corrupt)
        case "wrong-length":
            length = max(0, len(body) + rng.choice([-7, 7]))
            response.headers["content-length"] = str(length)
            body = body[:length]
        case "reset" | "truncated":
            writer.write(response.head() + body[:half])
            await writer.drain()
            if fault == "reset":
                connection: socket.socket = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            return False
        case "slow":
            writer.write(response.head())
            for byte in range(len(body)):
                writer.write(body[byte : byte + 1])
                await writer.drain()
                await asyncio.sleep(0.1)
            return True
    writer.write(response.head() + body)
    await writer.drain()
    return fault != "wrong-length"


def _error_response(fault: str) -> _Response:
    if fault == "html":
        return _Response(
            b"HTTP/1.1 200 OK",
            {"content-type": "text/html", "content-length": str(len(_LOGIN_PAGE))},
            _LOGIN_PAGE,
        )
    headers = {"content-length": "2"} | ({"retry-after": "0"} if fault == "429" else {})
    return _Response(f"HTTP/1.1 {fault} No".encode(), headers, b"no")


def _headers(head: bytes) -> dict[str, str]:
    """Header fields with lower-case names."""
    pairs = (line.decode("latin-1").partition(":") for line in head.split(b"\r\n")[1:] if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
