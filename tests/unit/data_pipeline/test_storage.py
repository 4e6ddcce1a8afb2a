"""Addresses, atomic writes and fetches; object stores against a real S3 server and a plain web
server."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common import object_store, retries, storage, store_copy, store_credentials
from data_pipeline.common.errors import StorageError
from data_pipeline.common.retries import Patience, Tries
from data_pipeline.common.store_errors import Kind
from tests.support.fault_proxy import FAULTS, fault_proxy
from tests.support.http_server import http_server
from tests.support.s3_server import S3Server


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.forget_clients()
    monkeypatch.setattr(store_copy, "_whole_only", {})


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server that knows no ranges, over `tmp_path/www`."""
    (tmp_path / "www").mkdir()
    with http_server(tmp_path / "www", ranges=False) as running:
        yield running.endpoint


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
    monkeypatch.setattr(store_copy, "PART_BYTES", 1 << 20)  # several parts, the last one short
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
def test_s3_an_object_that_changes_while_it_is_fetched_is_begun_again(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, size = "s3://shards/changing", 2 << 20
    monkeypatch.setattr(store_copy, "PART_BYTES", 1 << 20)
    storage.write_bytes(url, b"a" * size)
    ask, changes = store_copy.one_answer, iter([b"b", b"c"])

    def answer_after_change(*arguments: object) -> object:
        if arguments[1] and (letter := next(changes, None)):  # not the first part
            storage.write_bytes(url, letter * size)
        return ask(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store_copy, "one_answer", answer_after_change)
    storage.fetch_to_file(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"c" * size
    changes = (bytes([65 + number]) for number in range(100))  # and one that never stops
    with pytest.raises(StorageError, match="changed while it was read") as error:
        storage.fetch_to_file(url, tmp_path / "never")
    assert error.value.kind == "changed" and not (tmp_path / "never").exists()


@pytest.mark.s3
def test_s3_errors_are_short_and_keep_secrets(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StorageError, match=r"cannot read s3://shards/none: there is no such object"
    ):
        storage.read_bytes("s3://shards/none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(
        StorageError, match=r"refused access \(status 403\); check the credentials"
    ) as refused:
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


def test_a_web_server_without_ranges_gives_whole_files(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_copy, "PART_BYTES", 1000)
    data = os.urandom(5000)
    (tmp_path / "www" / "x.tar").write_bytes(data)
    storage.fetch_to_file(f"{web}/x.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(StorageError) as error:
        object_store.read_range(f"{web}/x.tar", 5, 10, timeout_seconds=5)
    assert error.value.kind == "no-ranges"


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


# Trying again.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "files" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(os.urandom(300_000))
    return path


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "flip"])
def test_a_fault_that_passes_heals(file: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Many requests go wrong; what comes is right all the same, from a server with and without
    ranges."""
    monkeypatch.setattr(store_copy, "PART_BYTES", 100_000)
    monkeypatch.setattr(store_copy, "SMALLEST_PART_BYTES", 1000)
    monkeypatch.setattr(retries, "MAX_WAIT_SECONDS", 0.1)
    for ranges in (True, False):
        with (
            http_server(file.parent, ranges=ranges) as web,
            fault_proxy(web.port, share=0.4, faults=[fault]) as proxy,
        ):
            url = f"{proxy.endpoint}/x.tar"
            with open(file.parent / "copy", "w+b") as copy:
                found = object_store.fetch(
                    url,
                    copy.fileno(),
                    timeout_seconds=20,
                    request_seconds=0.15,
                    expected_bytes=300_000,
                )
            assert (file.parent / "copy").read_bytes() == file.read_bytes()
            assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
            assert proxy.done[fault] > 0


def test_flipped_bits_in_what_has_no_checksum_of_its_own(file: Path) -> None:
    with (
        http_server(file.parent) as web,
        fault_proxy(web.port, share=0.4, faults=["flip", "html"], seed=3) as proxy,
    ):
        for _ in range(5):
            assert storage.read_bytes(f"{proxy.endpoint}/x.tar") == file.read_bytes()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert storage.read_bytes(f"{proxy.endpoint}/x.tar", sha256=digest) == file.read_bytes()
        with pytest.raises(
            StorageError, match=f"it has SHA-256 {digest}, but {'0' * 64} was expected"
        ):
            storage.read_bytes(f"{web.endpoint}/x.tar", sha256="0" * 64)
        assert proxy.done["flip"] and proxy.done["html"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("500", "unreachable"),
        ("429", "unreachable"),
        ("reset", "unreachable"),
        ("slow", "too-slow"),
        ("late", "too-slow"),
        ("404", "missing"),
    ],
)
def test_a_fault_that_stays_is_told_in_time(file: Path, fault: str, kind: str) -> None:
    with http_server(file.parent) as web, fault_proxy(web.port, share=1.0, faults=[fault]) as proxy:
        start = time.monotonic()
        with pytest.raises(StorageError) as error:
            object_store.read_range(
                f"{proxy.endpoint}/x.tar", 0, 200_000, timeout_seconds=1.5, request_seconds=0.4
            )
        assert error.value.kind == kind
        assert time.monotonic() - start < 15, "it waited much longer than it was told to"
        assert proxy.requests > 2, "it was not tried again"


def test_refusals_are_believed_at_once(file: Path) -> None:
    with http_server(file.parent, password="me:hush") as web:
        with pytest.raises(StorageError, match="refused access") as error:
            storage.read_bytes(f"{web.endpoint}/x.tar")
        assert error.value.kind == "refused" and len(web.requests) == 1


def test_a_slow_line_gets_smaller_parts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that takes too long is asked for in halves until the pieces come in time."""
    monkeypatch.setattr(store_copy, "SMALLEST_PART_BYTES", 1000)
    asked: list[int] = []
    real = store_copy.one_answer

    def slow_line(url: str, start: int, end: int, *more: object) -> object:
        asked.append(end - start)
        if end - start > 20_000:
            raise TimeoutError("operation timed out")
        return real(url, start, end, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(store_copy, "one_answer", slow_line)
    with http_server(file.parent) as web:
        data = object_store.read_range(f"{web.endpoint}/x.tar", 10, 150_010, timeout_seconds=20)
    assert data == file.read_bytes()[10:150_010]
    assert sorted(asked) == 8 * [18_750] + 4 * [37_500] + 2 * [75_000] + [150_000]


def test_a_fetch_that_is_no_longer_wanted_ends(file: Path) -> None:
    cancel = threading.Event()
    with http_server(file.parent) as web, fault_proxy(web.port, share=1.0, faults=["500"]) as proxy:
        threading.Timer(0.3, cancel.set).start()
        start = time.monotonic()
        with (
            open(file.parent / "copy", "w+b") as copy,
            pytest.raises(StorageError, match="no longer wanted"),
        ):
            object_store.fetch(
                f"{proxy.endpoint}/x.tar", copy.fileno(), timeout_seconds=60, cancel=cancel
            )
        assert time.monotonic() - start < 30, "it went on to the end of its time"


def _never(tries: Tries, error: Exception, kind: str) -> float:
    # What is final is not waited for, so whatever comes here may only have no wait to do.
    return 0.0 if tries._is_final(error, Kind(kind)) else pytest.fail("it is tried again")


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
def test_what_cannot_be_an_address_is_told_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of these would end obstore in a panic, which no `except` for errors catches."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setattr(Tries, "_wait", _never)
    with pytest.raises(
        StorageError, match=r"cannot be an address|cannot open|no object can have that name"
    ):
        storage.read_bytes(url, timeout_seconds=600.0)


# Who we are.


def test_profiles(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = a%b=\n\n"
        "[lab]\naws_access_key_id=two\naws_secret_access_key=c\naws_session_token=d\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile lab]\nregion = us-west-2\nendpoint_url = http://lab:9000\n"
        "[profile tool]\ncredential_process = /bin/keys --now\n"
    )
    home = {"HOME": str(tmp_path)}
    found = store_credentials.s3_settings(home)
    assert found == {"access_key_id": "one", "secret_access_key": "a%b=", "region": "eu-west-1"}
    found = store_credentials.s3_settings(home | {"AWS_PROFILE": "lab", "AWS_REGION": "here"})
    assert found == {
        "access_key_id": "two",
        "secret_access_key": "c",
        "session_token": "d",
        "region": "here",
        "endpoint": "http://lab:9000",
    }
    # Keys in the environment come first; the library reads those itself.
    found = store_credentials.s3_settings(
        home | {"AWS_PROFILE": "lab", "AWS_ACCESS_KEY_ID": "three"}
    )
    assert found == {"region": "us-west-2", "endpoint": "http://lab:9000"}
    with pytest.raises(StorageError, match=r"AWS_PROFILE is 'lap', but .* have default, lab, tool"):
        store_credentials.s3_settings(home | {"AWS_PROFILE": "lap"})
    with pytest.raises(StorageError, match="'tool' has credential_process, which is not read here"):
        store_credentials.s3_settings(home | {"AWS_PROFILE": "tool"})
    (tmp_path / ".aws" / "credentials").write_text("my-secret-key\n")
    with pytest.raises(StorageError, match="credentials is not in the form") as error:
        store_credentials.s3_settings(home)
    assert "my-secret" not in str(error.value) and error.value.__cause__ is None


def test_settings_of_other_stores() -> None:
    assert (
        store_credentials.gs_settings({"STORAGE_EMULATOR_HOST": "h:1"})["base_url"] == "http://h:1"
    )
    assert store_credentials.gs_settings({}) == {}
    text = (
        "DefaultEndpointsProtocol=http;AccountName=me;AccountKey=a2V5==;BlobEndpoint=http://h:1/me;"
    )
    assert store_credentials.az_settings({"AZURE_STORAGE_CONNECTION_STRING": text}) == {
        "account_name": "me",
        "account_key": "a2V5==",
        "endpoint": "http://h:1/me",
    }
    assert store_credentials.az_settings({"AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=x"}) == {
        "sas_key": "sv=1&sig=x"
    }


@pytest.mark.s3
def test_keys_of_a_profile_open_the_store(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3_server.env:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(
        f"[profile lab]\nendpoint_url={s3_server.endpoint}\nregion=us-east-1\n"
        f"aws_access_key_id={s3_server.env['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key={s3_server.env['AWS_SECRET_ACCESS_KEY']}\n"
    )
    storage.write_bytes("s3://shards/by-profile", b"here")
    assert storage.read_bytes("s3://shards/by-profile") == b"here"


_CANARY = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from data_pipeline.common import storage
storage.TIMEOUT_SECONDS = storage.read_bytes.__kwdefaults__["timeout_seconds"] = 1.0
for url in sys.argv[1:]:
    for ask in (storage.exists, storage.read_bytes, storage.list_names):
        try:
            print(ask(url))
        except Exception as error:
            import traceback
            traceback.print_exc()
"""


@pytest.mark.s3
def test_secrets_never_come_out(s3_server: S3Server, file: Path, tmp_path: Path) -> None:
    """Requests that go well and go wrong, with all that the process says, at the most talkative
    level."""
    secrets = [
        "CANARYKEY",
        "canary-secret",
        "canary-token",
        "canary-password",
        "canary-signature",
        "canary-profile",
    ]
    env = os.environ | {
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": "CANARYKEY",
        "RUST_LOG": "trace",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_SESSION_TOKEN": "canary-token",
        "HOME": str(tmp_path),
        "RUST_BACKTRACE": "full",
        "AZURE_STORAGE_ACCOUNT_NAME": "me",
        "AZURE_STORAGE_ACCOUNT_KEY": "canary-secret",
        "AZURE_STORAGE_ENDPOINT": s3_server.endpoint,
        "STORAGE_EMULATOR_HOST": s3_server.endpoint,
    }
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[canary]\naws_access_key_id=CANARYKEY\naws_secret_access_key canary-profile\n"
    )
    with http_server(file.parent, query="sig=canary-signature") as web:
        signed = f"{web.url('x.tar')}?sig=canary-signature".replace("://", "://me:canary-password@")
        urls = [
            "s3://shards/x",
            signed,
            signed.replace("x.tar", "none"),
            signed + "more",
            "az://c/x",
            "gs://b/x",
            "http://me:canary-password@127.0.0.1:9/x?sig=canary-signature",
            "s3://CANARY BAD BUCKET/x",
        ]
        said = ""
        for profile in ({}, {"AWS_PROFILE": "canary", "AWS_ACCESS_KEY_ID": ""}):
            done = subprocess.run(
                [sys.executable, "-c", _CANARY, *urls],
                env=env | profile,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            said += done.stdout + done.stderr
    assert (
        "refused access" in said
        and "there is no such object" in said
        and "cannot be reached" in said
    )
    assert [secret for secret in secrets if secret in said] == []


def test_requests_have_few_lengths() -> None:
    """Each length needs a client of its own, and what is left of a time differs with each call."""
    lengths = {Patience(total / 7, 20.0).next_request_seconds() for total in range(1, 1000)}
    assert len(lengths) <= 10
    assert all(20.0 / seconds in [2.0**power for power in range(12)] for seconds in lengths)
    assert all(
        Patience(total, 20.0).request_seconds <= total / 3 for total in (0.9, 5.0, 59.9, 200.0)
    )
    assert Patience(0.0, 20.0).next_request_seconds() > 0
