"""Addresses, and reads and atomic writes of local files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from data_pipeline.common import storage
from data_pipeline.common.errors import StorageError


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("a/b", True),
        ("/a b:c", True),
        ("file:/a", True),
        ("file:///a", True),
        ("s3://b/k", False),
        ("gs://b/k", False),
        ("az://c/k", False),
        ("https://h/k", False),
    ],
)
def test_is_local(url: str, local: bool) -> None:
    assert storage.is_local(url) is local


@pytest.mark.parametrize("url", ["pipe:cat x", "ftp://h/k", "-"])
def test_unsupported_addresses_are_rejected(url: str) -> None:
    with pytest.raises(StorageError, match=re.escape(url)):
        storage.is_local(url)


def test_join_parent_and_local_path() -> None:
    assert storage.join("s3://b/x/", "y.tar") == "s3://b/x/y.tar"
    assert storage.join("/", "y") == "/y"
    assert storage.parent("s3://b/x/y.tar") == "s3://b/x"
    assert storage.parent("file:///x/y.tar") == "/x"
    assert storage.local_path("file:///x/y") == storage.local_path("file:/x/y") == Path("/x/y")
    with pytest.raises(StorageError, match="'other'"):
        storage.local_path("file://other/x")


def test_redact_removes_secrets() -> None:
    redacted = storage.redact("https://me:my-password@host/x?X-Amz-Signature=abc")
    assert redacted == "https://host/x"


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(RuntimeError, match="half-way"), storage.atomic_write(path) as fd:
        os.write(fd, b"ne")
        raise RuntimeError("half-way")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes(str(path)) == b"old"


def test_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(StorageError, match=r"cannot write .*x.*No space left.*free some space"):
        with storage.atomic_write(tmp_path / "x"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"data")
    assert list(tmp_path.iterdir()) == []


def test_local_reads_and_copies(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    source = tmp_path / "source"
    storage.write_bytes(f"file://{source}", data)
    storage.fetch_to_file(str(source), tmp_path / "deep" / "copy", expected_bytes=len(data))
    assert (tmp_path / "deep" / "copy").read_bytes() == data
    assert storage.size(str(source)) == len(data)
    assert storage.list_names(str(tmp_path)) == ["source"]


def test_local_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"data")
    with pytest.raises(StorageError, match=r"source has 4 bytes.*\b5\b"):
        storage.fetch_to_file(str(tmp_path / "source"), tmp_path / "other", expected_bytes=5)
    assert not (tmp_path / "other").exists()
    with pytest.raises(StorageError, match=r"cannot read .*nothing: No such file.*check the path"):
        storage.read_bytes(str(tmp_path / "nothing"))
