"""Running stores of every kind (s3, gs, az, http), with one interface for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_pipeline.common import storage
from tests.support import azure_server, gcs_server, http_server
from tests.support.s3_server import s3_server

PASSWORD, INVALID_SECRET = "my-password", "not-the-key"
"""The password of the HTTP server, and the secret in invalid credentials."""


@dataclass(frozen=True, kw_only=True)
class RunningStore:
    """A running store of one kind."""

    kind: str
    env: dict[str, str]
    """Environment variables with the address and credentials."""
    url: Callable[[str], str]
    """The address of an object."""
    invalid_credentials: dict[str, str]
    """Environment variables with which reading is refused."""
    invalid_url: Callable[[str], str] = field(default=lambda url: url)
    """An address with which reading is refused."""
    put: Callable[[str, bytes], None] | None = None
    """Creates an object on a server to which the data pipeline cannot write; otherwise None."""
    can_list: bool = True

    @property
    def can_upload(self) -> bool:
        """Whether the data pipeline can write to this server."""
        return self.put is None

    def write(self, name: str, data: bytes) -> None:
        if self.put is not None:
            self.put(name, data)
        else:
            storage.write_bytes(self.url(name), data)

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy all files of a folder; returns the address of the copy."""
        for path in sorted(folder.iterdir()):
            self.write(f"{prefix}/{path.name}", path.read_bytes())
        return self.url(prefix)


@contextlib.contextmanager
def running_store(kind: str, folder: Path) -> Iterator[RunningStore]:
    """Start a store, or skip the test where its server is not installed.

    Args:
        kind: `s3`, `gs`, `az` or `http`.
        folder: An empty folder, for the HTTP server.
    """
    with _START[kind](folder) as store:
        yield store


@contextlib.contextmanager
def _s3_store(folder: Path) -> Iterator[RunningStore]:
    with s3_server() as server:
        yield RunningStore(
            kind="s3",
            env=server.env,
            url=server.url,
            invalid_credentials={"AWS_SECRET_ACCESS_KEY": INVALID_SECRET},
        )


@contextlib.contextmanager
def _gcs_store(folder: Path) -> Iterator[RunningStore]:
    if reason := gcs_server.why_unavailable():
        pytest.skip(reason)
    with gcs_server.gcs_server() as server:
        yield RunningStore(
            kind="gs",
            env=server.env,
            url=server.url,
            invalid_credentials={
                "STORAGE_EMULATOR_HOST": "",
                "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/account.json",
            },
            put=server.put,
        )


@contextlib.contextmanager
def _azure_store(folder: Path) -> Iterator[RunningStore]:
    if reason := azure_server.why_unavailable():
        pytest.skip(reason)
    with azure_server.azure_server() as server:
        yield RunningStore(
            kind="az",
            env=server.env,
            url=server.url,
            invalid_credentials={"AZURE_STORAGE_ACCOUNT_KEY": "bm90IHRoZSBrZXk="},
        )


@contextlib.contextmanager
def _http_store(folder: Path) -> Iterator[RunningStore]:
    netrc, files = folder / "netrc", folder / "files"
    netrc.write_text(f"machine 127.0.0.1 login me password {PASSWORD}\n")
    files.mkdir()
    with http_server.http_server(files, password=f"me:{PASSWORD}") as server:
        yield RunningStore(
            kind="http",
            env={"NETRC": str(netrc)},
            url=server.url,
            invalid_credentials={},
            invalid_url=lambda url: url.replace("://", f"://me:{INVALID_SECRET}@"),
            can_list=False,
        )


_START = {"s3": _s3_store, "gs": _gcs_store, "az": _azure_store, "http": _http_store}
