"""Credentials of object stores: where they are read from, and that they are never printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.common import storage, store_credentials
from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_credentials import LIBRARY_SOURCE
from tests.support.http_server import http_server
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("new_clients")


def test_aws_profiles(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = a%b=\n\n"
        "[lab]\naws_access_key_id=two\naws_secret_access_key=c\naws_session_token=d\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nregion = eu-west-1\n"
        "[profile lab]\nregion = us-west-2\nendpoint_url = http://lab:9000\n"
        "[profile tool]\ncredential_process = /bin/keys --now\nendpoint_url = http://tool:9000\n"
        "[profile role]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = lab\n"
    )
    home = {"HOME": str(tmp_path)}
    settings = store_credentials.s3_settings(home)
    assert settings == {"access_key_id": "one", "secret_access_key": "a%b=", "region": "eu-west-1"}

    settings = store_credentials.s3_settings(home | {"AWS_PROFILE": "lab", "AWS_REGION": "here"})
    assert settings == {
        "access_key_id": "two",
        "secret_access_key": "c",
        "session_token": "d",
        "region": "here",
        "endpoint": "http://lab:9000",
    }
    # Keys in the environment have priority; obstore reads them itself.
    settings = store_credentials.s3_settings(
        home | {"AWS_PROFILE": "lab", "AWS_ACCESS_KEY_ID": "three"}
    )
    assert settings == {"region": "us-west-2", "endpoint": "http://lab:9000"}

    with pytest.raises(StorageError, match=r"AWS_PROFILE is 'lap'.*: default, lab, role, tool"):
        store_credentials.s3_settings(home | {"AWS_PROFILE": "lap"})
    settings = store_credentials.s3_settings(home | {"AWS_PROFILE": "tool"})
    endpoint = {"endpoint": "http://tool:9000"}
    assert settings == {LIBRARY_SOURCE: "tool", "region": "us-east-1"} | endpoint
    settings = store_credentials.s3_settings(home | {"AWS_PROFILE": "role"})
    assert settings == {LIBRARY_SOURCE: "role", "region": "us-east-1"}
    settings = store_credentials.s3_settings(
        home | {"AWS_PROFILE": "tool", "AWS_ACCESS_KEY_ID": "three"}
    )
    assert settings == {"region": "us-east-1"} | endpoint


def test_errors_of_aws_files_do_not_quote_them(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("my-secret-key\n")
    with pytest.raises(StorageError, match=r"\.aws/credentials is not a valid") as error:
        store_credentials.s3_settings({"HOME": str(tmp_path)})
    assert "my-secret" not in str(error.value) and error.value.__cause__ is None


def test_gs_and_az_settings() -> None:
    settings = store_credentials.gs_settings({"STORAGE_EMULATOR_HOST": "h:1"})
    assert settings["base_url"] == "http://h:1"
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
def test_s3_access_with_a_profile(
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


_CANARY_PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from data_pipeline.common import storage
OPERATIONS = (storage.exists, storage.read_bytes, storage.list_names)
for operation in OPERATIONS:
    operation.__kwdefaults__["timeout_seconds"] = 1.0
for url in sys.argv[1:]:
    for operation in OPERATIONS:
        try:
            print(operation(url))
        except Exception as error:
            import traceback
            traceback.print_exc()
"""
SECRETS = [
    "CANARYKEY",
    "canary-secret",
    "canary-token",
    "canary-password",
    "canary-signature",
    "canary-profile",
]


@pytest.mark.s3
def test_secrets_are_never_printed(s3_server: S3Server, tmp_path: Path) -> None:
    """Successful and failing requests at the most verbose log level: no output has a secret."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x.tar").write_bytes(os.urandom(300_000))
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
    with http_server(tmp_path / "files", query="sig=canary-signature") as web:
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
        output = ""
        for profile in ({}, {"AWS_PROFILE": "canary", "AWS_ACCESS_KEY_ID": ""}):
            process = subprocess.run(
                [sys.executable, "-c", _CANARY_PROGRAM, *urls],
                env=env | profile,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert process.returncode == 0, process.stderr[-2000:]
            output += process.stdout + process.stderr
    for expected in ("refused access", "there is no such object", "cannot be reached"):
        assert expected in output
    assert [secret for secret in SECRETS if secret in output] == []
