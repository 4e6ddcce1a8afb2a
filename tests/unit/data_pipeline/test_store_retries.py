"""Retries: temporary faults of a server are hidden, permanent ones are reported in time."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.common import object_store, retries, storage, store_download
from data_pipeline.common.deadline import Deadline
from data_pipeline.common.errors import StorageError
from tests.support.fault_proxy import FAULTS, fault_proxy
from tests.support.http_server import http_server

pytestmark = pytest.mark.usefixtures("new_clients")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "files" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(os.urandom(300_000))
    return path


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "bit-flip"])
def test_temporary_faults_are_retried(
    file: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Many requests fail; the download is still right, from servers with and without ranges."""
    monkeypatch.setattr(store_download, "PART_BYTES", 100_000)
    monkeypatch.setattr(store_download, "SMALLEST_PART_BYTES", 1000)
    monkeypatch.setattr(retries, "MAX_WAIT_SECONDS", 0.1)
    for ranges in (True, False):
        with (
            http_server(file.parent, ranges=ranges) as web,
            fault_proxy(web.port, fault_rate=0.4, faults=[fault]) as proxy,
            open(file.parent / "copy", "w+b") as copy,
        ):
            result = object_store.fetch(
                f"{proxy.endpoint}/x.tar",
                copy.fileno(),
                timeout_seconds=20,
                request_seconds=0.15,
                expected_bytes=300_000,
            )
        assert (file.parent / "copy").read_bytes() == file.read_bytes()
        assert result.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert proxy.fault_counts[fault] > 0


def test_bit_flips_without_a_checksum_are_detected(file: Path) -> None:
    with (
        http_server(file.parent) as web,
        fault_proxy(web.port, fault_rate=0.4, faults=["bit-flip", "html"], seed=3) as proxy,
    ):
        for _ in range(5):
            assert storage.read_bytes(f"{proxy.endpoint}/x.tar") == file.read_bytes()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert storage.read_bytes(f"{proxy.endpoint}/x.tar", sha256=digest) == file.read_bytes()
        with pytest.raises(StorageError, match=f"x.tar.*{digest}.*{'0' * 64}"):
            storage.read_bytes(f"{web.endpoint}/x.tar", sha256="0" * 64)
        assert proxy.fault_counts["bit-flip"] and proxy.fault_counts["html"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("500", "unreachable"),
        ("429", "unreachable"),
        ("reset", "unreachable"),
        ("slow", "too-slow"),
        ("delayed", "too-slow"),
        ("404", "missing"),
    ],
)
def test_permanent_faults_are_reported_in_time(file: Path, fault: str, kind: str) -> None:
    with (
        http_server(file.parent) as web,
        fault_proxy(web.port, fault_rate=1.0, faults=[fault]) as proxy,
    ):
        start = time.monotonic()
        with pytest.raises(StorageError) as error:
            object_store.read_range(
                f"{proxy.endpoint}/x.tar", 0, 200_000, timeout_seconds=1.5, request_seconds=0.4
            )
        assert error.value.kind == kind
        assert time.monotonic() - start < 15, "it waited much longer than the timeout"
        assert proxy.requests > 2, "it was not retried"


def test_refused_access_is_not_retried(file: Path) -> None:
    with http_server(file.parent, password="me:my-password") as web:
        with pytest.raises(StorageError, match="refused access") as error:
            storage.read_bytes(f"{web.endpoint}/x.tar")
        assert error.value.kind == "refused" and len(web.requests) == 1


def test_slow_connection_gets_smaller_parts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a timeout a part is requested in halves until the parts arrive in time."""
    monkeypatch.setattr(store_download, "SMALLEST_PART_BYTES", 1000)
    sizes: list[int] = []
    request_range = store_download.request_range

    def slow_request(url: str, start: int, end: int, *rest: object) -> object:
        sizes.append(end - start)
        if end - start > 20_000:
            raise TimeoutError("operation timed out")
        return request_range(url, start, end, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store_download, "request_range", slow_request)
    with http_server(file.parent) as web:
        data = object_store.read_range(f"{web.endpoint}/x.tar", 10, 150_010, timeout_seconds=20)
    assert data == file.read_bytes()[10:150_010]
    assert sorted(sizes) == 8 * [18_750] + 4 * [37_500] + 2 * [75_000] + [150_000]


def test_cancelled_download_stops(file: Path) -> None:
    cancel = threading.Event()
    with (
        http_server(file.parent) as web,
        fault_proxy(web.port, fault_rate=1.0, faults=["500"]) as proxy,
    ):
        threading.Timer(0.3, cancel.set).start()
        start = time.monotonic()
        with (
            open(file.parent / "copy", "w+b") as copy,
            pytest.raises(StorageError, match=r"x\.tar was cancelled"),
        ):
            object_store.fetch(
                f"{proxy.endpoint}/x.tar", copy.fileno(), timeout_seconds=60, cancel=cancel
            )
        assert time.monotonic() - start < 30, "it continued until the timeout"


def test_request_timeouts_have_few_values() -> None:
    """Each value needs its own client, and the remaining time differs at each call."""
    timeouts = {Deadline(total / 7, 20.0).next_request_seconds() for total in range(1, 1000)}
    assert len(timeouts) <= 10
    assert all(20.0 / seconds in [2.0**power for power in range(12)] for seconds in timeouts)
    for total in (0.9, 5.0, 59.9, 200.0):
        assert Deadline(total, 20.0).request_seconds <= total / 3
    assert Deadline(0.0, 20.0).next_request_seconds() > 0
