"""A proxy that spoils answers, in front of any HTTP server: for tests of whoever reads from a
store.

    with fault_proxy(server.port, share=0.1, seed=1) as proxy:
        ... read through proxy.endpoint ...
        print(proxy.done)      # how many of each fault

Which request is spoiled, and how, is drawn from the seed and the request's number. The `Host`
header goes through as it came, so signed requests stay valid.
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
    "cut",
    "wrong-length",
    "late",
    "flip",
)
"""Error statuses; a web page with 200; the connection reset or closed in the body, or the body at
10 B/s; another `Content-Length` than the body's, the answer after `late_seconds`, and one flipped
bit."""
_PAGE = b"<html><body>Please sign in to the network.</body></html>"


@dataclass(kw_only=True)
class FaultProxy:
    """A running proxy."""

    upstream: int
    """Port on 127.0.0.1 of the server behind it."""
    share: float
    """Share of the requests that are spoiled."""
    seed: int = 0
    faults: Sequence[str] = FAULTS
    late_seconds: float = 30.0
    only: Callable[[str], bool] = lambda path: True
    """Which paths may be spoiled."""
    port: int = 0
    requests: int = 0
    done: Counter[str] = field(default_factory=Counter)
    """How often each fault was made."""
    most_at_once: int = 0
    """Most connections at a time."""

    @property
    def endpoint(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    def draw(self, method: str, path: str) -> tuple[str, random.Random]:
        """The fault of the next request (empty for none), and what else about it is drawn from."""
        self.requests += 1
        chance = random.Random(f"{self.seed} {self.requests}")
        spoiled = chance.random() < self.share and method in ("GET", "HEAD") and self.only(path)
        fault = chance.choice(list(self.faults)) if spoiled else ""
        if fault:
            self.done[fault] += 1
        return fault, chance


@contextmanager
def fault_proxy(
    upstream: int,
    *,
    share: float,
    seed: int = 0,
    faults: Sequence[str] = FAULTS,
    late_seconds: float = 30.0,
    only: Callable[[str], bool] = lambda path: True,
) -> Iterator[FaultProxy]:
    """Run a proxy before the server at port `upstream` until the end of the block."""
    proxy = FaultProxy(
        upstream=upstream,
        share=share,
        seed=seed,
        faults=faults,
        late_seconds=late_seconds,
        only=only,
    )
    loop, ready = asyncio.new_event_loop(), threading.Event()
    end = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(_counted(proxy), "127.0.0.1", 0)
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


def _counted(proxy: FaultProxy) -> _Handler:
    open_now = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        proxy.most_at_once = max(proxy.most_at_once, open_now)
        # A client that goes away in the middle is what these tests are about.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CanceledError):
            while await _one_request(proxy, reader, writer):
                pass
        open_now -= 1
        writer.close()

    return handle


@dataclass
class _Answer:
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
    """Answer one request; False when the connection is over."""
    head = await reader.readuntil(b"\r\n\r\n")
    method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
    body = await reader.readexactly(int(_headers(head).get("content-length", "0")))
    fault, chance = proxy.draw(method, path)
    if fault == "late":
        await asyncio.sleep(proxy.late_seconds)
    if fault in ("500", "503", "429", "404", "html"):
        answer = _refusal(fault)
    else:
        answer = await _ask(proxy.upstream, method, head, body)
    if method == "HEAD":
        writer.write(answer.head() if fault != "reset" else b"HTTP/1.1 200")
        await writer.drain()
        return fault not in ("reset", "cut")
    return await _send(writer, answer, fault, chance)


async def _ask(port: int, method: str, head: bytes, body: bytes) -> _Answer:
    """What the server behind says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first, _, rest = head.partition(b"\r\n")
    lines = [line for line in rest.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    try:
        writer.write(first + b"\r\nConnection: close\r\n" + b"\r\n".join(lines) + body)
        await writer.drain()
        while True:
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith((b"HTTP/1.1 100", b"HTTP/1.0 100")):
                break
        headers = _headers(answer)
        data = b"" if method == "HEAD" else await _body(reader, headers)
    finally:
        writer.close()
    status, kept = answer.split(b"\r\n", 1)[0], {}
    for name, value in headers.items():
        if name not in ("transfer-encoding", "connection"):
            kept[name] = value
    if method != "HEAD" and not status.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        kept["content-length"] = str(len(data))
    return _Answer(status, kept, data)


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        pieces = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            pieces.append(await reader.readexactly(size))
            await reader.readline()
        return b"".join(pieces)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()


async def _send(
    writer: asyncio.StreamWriter, answer: _Answer, fault: str, chance: random.Random
) -> bool:
    """Send an answer, spoiled by `fault`; False when the connection is over."""
    body, half = answer.body, len(answer.body) // 2
    match fault:
        case "flip" if body:
            spoiled = bytearray(body)
            spoiled[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
            body = bytes(spoiled)
        case "wrong-length":
            announced = max(0, len(body) + chance.choice([-7, 7]))
            answer.headers["content-length"] = str(announced)
            body = body[:announced]
        case "reset" | "cut":
            writer.write(answer.head() + body[:half])
            await writer.drain()
            if fault == "reset":
                found: socket.socket = writer.get_extra_info("socket")
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            return False
        case "slow":
            writer.write(answer.head())
            for byte in range(len(body)):
                writer.write(body[byte : byte + 1])
                await writer.drain()
                await asyncio.sleep(0.1)
            return True
    writer.write(answer.head() + body)
    await writer.drain()
    return fault != "wrong-length"


def _refusal(fault: str) -> _Answer:
    if fault == "html":
        return _Answer(
            b"HTTP/1.1 200 OK",
            {"content-type": "text/html", "content-length": str(len(_PAGE))},
            _PAGE,
        )
    headers = {"content-length": "2"} | ({"retry-after": "0"} if fault == "429" else {})
    return _Answer(f"HTTP/1.1 {fault} No".encode(), headers, b"no")


def _headers(head: bytes) -> dict[str, str]:
    """Names in lower case."""
    pairs = (line.decode("latin-1").partition(":") for line in head.split(b"\r\n")[1:] if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
