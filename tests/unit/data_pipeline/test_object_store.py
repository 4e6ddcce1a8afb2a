"""Object stores: a real S3 server and a plain web server."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from data_pipeline.common import object_store, storage, store_download
from data_pipeline.common.errors import StorageError
from data_pipeline.common.retries import RetryState
from data_pipeline.common.store_errors import ErrorKind
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("new_clients")


@pytest.mark.s3
def test_s3_round_trip(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_download, "PART_BYTES", 1 << 20)  # several parts, the last one short
    data, url = os.urandom((3 << 20) + 17), "s3://shards/folder/object"
    assert not storage.exists(url)
    storage.write_bytes(url, data)
    assert storage.exists(url)
    assert storage.size(url) == len(data)
    assert storage.read_bytes(url) == data
    assert storage.list_names("s3://shards/folder") == ["object"]
    storage.fetch_to_file(url, tmp_path / "copy", expected_bytes=len(data))
    assert (tmp_path / "copy").read_bytes() == data

    storage.write_bytes("s3://shards/folder/empty", b"")
    storage.fetch_to_file("s3://shards/folder/empty", tmp_path / "empty", expected_bytes=0)
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.s3
def test_s3_download_restarts_if_the_object_changes(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, size = "s3://shards/changing", 2 << 20
    monkeypatch.setattr(store_download, "PART_BYTES", 1 << 20)
    storage.write_bytes(url, b"a" * size)
    request_range, changes = store_download.request_range, iter([b"b", b"c"])

    def change_then_request(*arguments: object) -> object:
        if arguments[1] and (letter := next(changes, None)):  # not for the first part
            storage.write_bytes(url, letter * size)
        return request_range(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store_download, "request_range", change_then_request)
    storage.fetch_to_file(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"c" * size

    changes = (bytes([65 + number]) for number in range(100))  # an object that keeps changing
    with pytest.raises(StorageError, match=r"changing.*changed") as error:
        storage.fetch_to_file(url, tmp_path / "never")
    assert error.value.kind == "changed" and not (tmp_path / "never").exists()


@pytest.mark.s3
def test_s3_errors_are_short_and_contain_no_secrets(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"cannot read s3://shards/none") as missing:
        storage.read_bytes("s3://shards/none")
    assert missing.value.kind == "missing"

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError, match=r"status 403.*credentials") as refused:
        storage.read_bytes("s3://shards/none")
    assert refused.value.kind == "refused"
    assert "secret" not in str(refused.value)
    assert "testkey" not in str(refused.value)
    assert refused.value.__cause__ is None  # obstore's message quotes the signed request


@pytest.mark.s3
def test_s3_disk_full_during_download(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes("s3://shards/large", b"x" * 1000)

    def disk_full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", disk_full)
    with pytest.raises(StorageError, match=r"cannot write .*copy: No space left.*disk is full"):
        storage.fetch_to_file("s3://shards/large", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_unreachable_store_fails_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "my-password")
    with pytest.raises(StorageError, match=r"cannot be reached.*AWS_ENDPOINT_URL") as error:
        storage.read_bytes("s3://bucket/x", timeout_seconds=2.0)
    assert "my-password" not in str(error.value)


def test_http_reads_whole_files(web: str, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "www" / "x.tar").write_bytes(data)
    storage.fetch_to_file(f"{web}/x.tar", tmp_path / "copy", expected_bytes=len(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert storage.read_bytes(f"{web}/x.tar") == data
    with pytest.raises(StorageError, match="no such object"):
        storage.read_bytes(f"{web}/y.tar")


def test_http_server_without_ranges(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_download, "PART_BYTES", 1000)
    data = os.urandom(5000)
    (tmp_path / "www" / "x.tar").write_bytes(data)
    storage.fetch_to_file(f"{web}/x.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(StorageError) as error:
        object_store.read_range(f"{web}/x.tar", 5, 10, timeout_seconds=5)
    assert error.value.kind == "no-ranges"


def _read_in_child(url: str, results: multiprocessing.Queue[str]) -> None:
    try:
        results.put(repr(storage.read_bytes(url, timeout_seconds=5)))
    except StorageError as error:
        results.put(str(error))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_gets_an_error_instead_of_hanging(web: str, tmp_path: Path) -> None:
    (tmp_path / "www" / "x").write_bytes(b"here")
    assert storage.read_bytes(f"{web}/x") == b"here"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(f"{web}/x", results))
    child.start()
    assert "was forked" in results.get(timeout=20)
    child.join()


def _fail_on_retry(retries: RetryState, error: Exception, kind: str) -> float:
    # Called for permanent failures too, whose wait is not used.
    if not retries._is_final(error, ErrorKind(kind)):
        pytest.fail("it is retried")
    return 0.0


@pytest.mark.parametrize(
    "url",
    [
        "s3://a<b/x",
        "s3://a b/x",
        "s3:///x",
        "s3://\u00fc/x",
        "http://h^/x",
        'http://127.0.0.1:9/a?b"\u00fc',
        "s3://b/a//b",
        "s3://b/../x",
    ],
)
def test_invalid_addresses_are_not_retried(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of these would make obstore panic, which no `except Exception` catches."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "my-password")
    monkeypatch.setattr(RetryState, "_wait", _fail_on_retry)
    with pytest.raises(
        StorageError, match=r"not a valid address|cannot open|no object can have that name"
    ):
        storage.read_bytes(url, timeout_seconds=600.0)
