"""Addresses, atomic writes and fetches; object stores against a real S3 server and a plain web server."""

from __future__ import annotations

import errno
import functools
import http.server
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common import object_store, storage
from data_pipeline.common.errors import StorageError
from tests.support.s3_server import S3Server


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(object_store, "_clients_pid", None)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server that knows no ranges, over `tmp_path/www`."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.parametrize(
    ("url", "local"),
    [("a/b", True), ("/a b:c", True), ("file:/a", True), ("file:///a", True), ("s3://b/k", False),
     ("gs://b/k", False), ("az://c/k", False), ("https://h/k", False)],
)  # fmt: skip
def test_addresses_are_told_apart(url: str, local: bool) -> None:
    assert storage.is_local(url) is local


@pytest.mark.parametrize("url", ["pipe:cat x", "ftp://h/k", "-"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="address"):
        storage.is_local(url)


def test_join_parent_and_local_path() -> None:
    assert storage.join("s3://b/x/", "y.tar") == "s3://b/x/y.tar"
    assert storage.join("/", "y") == "/y"
    assert storage.parent("s3://b/x/y.tar") == "s3://b/x"
    assert storage.parent("file:///x/y.tar") == "/x"
    assert storage.local_path("file:///x/y") == storage.local_path("file:/x/y") == Path("/x/y")
    with pytest.raises(StorageError, match="names the machine"):
        storage.local_path("file://other/x")


def test_shown_addresses_hold_no_secrets() -> None:
    shown = storage.redact("https://me:hush@host/x?X-Amz-Signature=abc")
    assert shown == "https://host/x"


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(RuntimeError, match="half-way"), storage.replacing(path) as fd:
        os.write(fd, b"ne")
        raise RuntimeError("half-way")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes(str(path)) == b"old"


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(StorageError, match=r"cannot write .*x.*No space left.*free some space"):
        with storage.replacing(tmp_path / "x"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"data")
    assert list(tmp_path.iterdir()) == []


def test_local_reads_and_fetches(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    source = tmp_path / "source"
    storage.write_bytes(f"file://{source}", data)
    storage.fetch_to_file(str(source), tmp_path / "deep" / "copy", expected_bytes=len(data))
    assert (tmp_path / "deep" / "copy").read_bytes() == data
    assert storage.size(str(source)) == len(data)
    assert storage.list_names(str(tmp_path)) == ["source"]
    with pytest.raises(StorageError, match=rf"source has {len(data)} bytes, but 5 were expected"):
        storage.fetch_to_file(str(source), tmp_path / "other", expected_bytes=5)
    assert not (tmp_path / "other").exists()
    with pytest.raises(StorageError, match=r"cannot read .*nothing: No such file.*check the path"):
        storage.read_bytes(str(tmp_path / "nothing"))


@pytest.mark.s3
def test_s3_round_trip(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 1 << 20)  # several parts, the last one short
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
def test_s3_an_object_that_changes_while_it_is_fetched_is_noticed(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, size = "s3://shards/changing", 2 << 20
    monkeypatch.setattr(object_store, "PART_BYTES", 1 << 20)
    storage.write_bytes(url, b"a" * size)
    ask = object_store._part

    def part_after_change(*arguments: object) -> bytes:
        if arguments[3]:  # not the first part
            storage.write_bytes(url, b"b" * size)
        return ask(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(object_store, "PARTS_IN_FLIGHT", 1)
    monkeypatch.setattr(object_store, "_part", part_after_change)
    with pytest.raises(StorageError, match="changed while it was read"):
        storage.fetch_to_file(url, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_s3_errors_are_short_and_keep_secrets(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"cannot read s3://shards/none: there is no such object"):
        storage.read_bytes("s3://shards/none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    monkeypatch.setattr(object_store, "_clients", {})
    with pytest.raises(StorageError, match="refused access; check the credentials") as refused:
        storage.read_bytes("s3://shards/none")
    assert "secret" not in str(refused.value)
    assert "testkey" not in str(refused.value)
    assert refused.value.__cause__ is None  # the library's text quotes the signed request


def test_an_unreachable_store_fails_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    with pytest.raises(StorageError, match="cannot be reached") as error:
        storage.read_bytes("s3://bucket/x", timeout_seconds=2.0)
    assert "hush" not in str(error.value)


def test_http_files_come_whole(web: str, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "www" / "x.tar").write_bytes(data)
    storage.fetch_to_file(f"{web}/x.tar", tmp_path / "copy", expected_bytes=len(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert storage.read_bytes(f"{web}/x.tar") == data
    with pytest.raises(StorageError, match="no such object"):
        storage.read_bytes(f"{web}/y.tar")
    with pytest.raises(StorageError, match="with a query"):
        storage.read_bytes(f"{web}/x.tar?signature=hush")


def _read_in_child(url: str, answers: multiprocessing.Queue[str]) -> None:
    try:
        answers.put(repr(storage.read_bytes(url, timeout_seconds=5)))
    except StorageError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_waiting_for_ever(web: str, tmp_path: Path) -> None:
    (tmp_path / "www" / "x").write_bytes(b"here")
    assert storage.read_bytes(f"{web}/x") == b"here"
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(f"{web}/x", answers))
    child.start()
    assert "was forked" in answers.get(timeout=20)
    child.join()


def test_a_web_server_without_ranges_cannot_give_large_files(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 1000)
    (tmp_path / "www" / "x.tar").write_bytes(os.urandom(5000))
    with pytest.raises(StorageError, match="gives no ranges"):
        storage.fetch_to_file(f"{web}/x.tar", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.s3
def test_a_disk_that_fills_while_fetching(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes("s3://shards/large", b"x" * 1000)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"cannot write .*copy: No space left.*the disk is full"):
        storage.fetch_to_file("s3://shards/large", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
