"""An Azure Blob Storage server for tests: Microsoft's azurite (from npm) on loopback.

It checks signatures. It must be in PATH or in `azurite/` of this Python environment, where
`python -m tests.support.azure_server` installs it (190 MB, a few seconds).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import AzureStore

from tests.support.ports import free_ports
from tests.support.processes import kill_on_stdin_close

CONTAINER = "shards"
VERSION = "3.35.0"
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Not a secret: the default account of every azurite."""
_READY_SECONDS, _STOP_SECONDS = 30.0, 15.0


@dataclass(frozen=True, kw_only=True)
class AzureServer:
    """A running server with one container."""

    port: int

    @property
    def endpoint(self) -> str:
        """Base URL of the account."""
        return f"http://127.0.0.1:{self.port}/{_ACCOUNT}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for clients of this server."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
        }

    def url(self, path: str = "") -> str:
        """`az://` URL of an object or folder of the container."""
        return f"az://{CONTAINER}/{path}".rstrip("/")


def why_unavailable() -> str:
    """Why no server can be started, and what to do; empty if it can."""
    if _program():
        return ""
    return "azurite is not installed; run python -m tests.support.azure_server"


@contextmanager
def azure_server() -> Iterator[AzureServer]:
    """Run a server with an empty container.

    Raises:
        RuntimeError: The server did not start.
    """
    (port,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="vlmoe-azure-"))
    command = [
        *(
            *_program(),
            "--blobPort",
            str(port),
            "--inMemoryPersistence",
            "--extentMemoryLimit",
            "256",
        ),
        *("--skipApiVersionCheck", "--silent", "--disableTelemetry"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            kill_on_stdin_close(command, [folder]),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    try:
        server = AzureServer(port=port)
        _create_container(server, folder / "log")
        yield server
    finally:
        process.communicate(timeout=_STOP_SECONDS)  # closes its standard input, which kills it


def _program() -> list[str]:
    """Command prefix; empty if not installed. It runs node itself: killing a wrapper script would
    leave node running."""
    node = shutil.which("node") or str(Path(sys.prefix, "bin", "node"))
    script = Path(
        sys.prefix, "azurite", "node_modules", "azurite", "dist", "src", "blob", "main.js"
    )
    installed = shutil.which("azurite-blob")
    if installed is not None:
        script = Path(installed).resolve()
    return [node, str(script)] if script.exists() and os.path.exists(node) else []


def _create_container(server: AzureServer, log: Path) -> None:
    store = AzureStore(
        CONTAINER,
        account_name=_ACCOUNT,
        account_key=_KEY,
        endpoint=server.endpoint,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            _request_container(server)
            obstore.put(store, "ready", b"yes")
            obstore.delete(store, "ready")
            return
        except Exception as error:  # any failure means "not ready yet" until the deadline
            if time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(
                    f"azurite did not become ready ({error}); its log ends:\n{text}"
                ) from error
            time.sleep(0.1)


def _request_container(server: AzureServer) -> None:
    """Create the container with a signed request; obstore cannot create one."""
    import base64
    import email.utils
    import hashlib
    import hmac
    import urllib.error
    import urllib.request

    date = email.utils.formatdate(usegmt=True)
    headers = f"x-ms-date:{date}\nx-ms-version:2021-12-02\n"
    resource = f"/{_ACCOUNT}/{_ACCOUNT}/{CONTAINER}\nrestype:container"
    text = "PUT" + "\n" * 12 + headers + resource
    signature = base64.b64encode(
        hmac.new(base64.b64decode(_KEY), text.encode(), hashlib.sha256).digest()
    ).decode()
    request = urllib.request.Request(
        f"{server.endpoint}/{CONTAINER}?restype=container",
        method="PUT",
        headers={
            "x-ms-date": date,
            "x-ms-version": "2021-12-02",
            "Content-Length": "0",
            "Authorization": f"SharedKey {_ACCOUNT}:{signature}",
        },
    )
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code != 409:  # 409: it already exists
            raise


def install() -> None:
    """Install azurite in this Python environment."""
    from tools.quickstart_data.fetch import npm_command

    npm, environment = npm_command()
    arguments = [
        "install",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        f"--prefix={Path(sys.prefix, 'azurite')}",
    ]
    subprocess.run([*npm, *arguments, f"azurite@{VERSION}"], env=environment, check=True)


if __name__ == "__main__":
    install()
