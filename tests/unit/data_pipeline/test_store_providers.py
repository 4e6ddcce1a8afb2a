"""Credentials from the libraries of the clouds: renewal, failures, and that nothing is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common import storage, store_credentials, store_providers
from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_clients import get_client
from data_pipeline.common.store_credentials import LIBRARY_SOURCE
from data_pipeline.common.store_errors import ErrorKind
from tests.support.reply_server import ReplyServer, reply_server
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("new_clients")

# Appends a line to `calls`, so that the calls can be counted.
_KEYS_PROGRAM = """
import datetime, json, sys
folder, key, secret, seconds = sys.argv[1:]
open(folder + "/calls", "a").write("x\\n")
expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=float(seconds))
print(json.dumps({"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret,
                  "Expiration": expires.isoformat()}))
"""


@pytest.fixture
def web_server() -> Iterator[ReplyServer]:
    with reply_server() as server:
        yield server


@pytest.fixture
def profile(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Writes the settings of the AWS profile `lab`, the only source of credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    (tmp_path / "keys.py").write_text(_KEYS_PROGRAM)

    def write(text: str) -> None:
        (tmp_path / ".aws" / "config").write_text(
            f"[profile lab]\nendpoint_url = {s3_server.endpoint}\n{text}\n"
        )

    return write


def _process(folder: Path, server: S3Server, seconds: float, secret: str = "") -> str:
    key, valid = server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"]
    program = f"{sys.executable} {folder / 'keys.py'}"
    return f"credential_process = {program} {folder} {key} {secret or valid} {seconds}"


def _calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.mark.s3
def test_credential_process(
    profile: Callable[[str], None], s3_server: S3Server, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    profile(_process(tmp_path, s3_server, seconds=3600))
    storage.write_bytes("s3://shards/by-process", b"here")
    assert storage.read_bytes("s3://shards/by-process") == b"here"
    first, _ = get_client("s3://shards/x", 20.0)
    second, _ = get_client("s3://shards/x", 10.0)
    third, _ = get_client("s3://other/x", 20.0)
    assert len({id(client) for client in (first, second, third)}) == 3
    assert _calls(tmp_path) == 1, "all clients share the credentials"


@pytest.mark.s3
def test_the_server_checks_keys_of_a_credential_process(
    profile: Callable[[str], None], s3_server: S3Server, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    profile(_process(tmp_path, s3_server, seconds=3600, secret="wrong"))
    with pytest.raises(StorageError, match="refused access") as error:
        storage.write_bytes("s3://shards/by-process", b"here")
    assert error.value.kind == ErrorKind.REFUSED


@pytest.mark.s3
def test_expired_credentials_are_renewed(
    profile: Callable[[str], None], s3_server: S3Server, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    profile(_process(tmp_path, s3_server, seconds=4))
    storage.write_bytes("s3://shards/renewed", b"here")
    calls = _calls(tmp_path)
    client, _ = get_client("s3://shards/renewed", 20.0)
    time.sleep(4.2)
    assert storage.read_bytes("s3://shards/renewed") == b"here"
    assert _calls(tmp_path) > calls
    assert get_client("s3://shards/renewed", 20.0)[0] is client


@pytest.mark.s3
def test_role_of_another_profile(
    profile: Callable[[str], None],
    tmp_path: Path,
    web_server: ReplyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("boto3")
    profile("role_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = base")
    (tmp_path / ".aws" / "credentials").write_text(
        "[base]\naws_access_key_id = basekey\naws_secret_access_key = basesecret\n"
    )
    expires_at = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", web_server.url)
    web_server.reply = (
        200,
        "text/xml",
        '<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult>'
        "<Credentials><AccessKeyId>rolekey</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
        f"<SessionToken>t</SessionToken><Expiration>{expires_at.isoformat()}</Expiration>"
        "</Credentials></AssumeRoleResult></AssumeRoleResponse>",
    )
    credential = store_providers.make_provider("s3", "lab")()
    keys = ("access_key_id", "secret_access_key", "token")
    assert [credential[name] for name in keys] == ["rolekey", "s", "t"]
    assert expires_at - timedelta(minutes=20) < credential["expires_at"] < expires_at
    assert len(web_server.authorizations) == 1 and "basekey" in web_server.authorizations[0]

    web_server.reply = (
        403,
        "text/xml",
        "<ErrorResponse><Error><Code>AccessDenied</Code><Message>SECRET</Message></Error>"
        "</ErrorResponse>",
    )
    with pytest.raises(StorageError, match=r"ClientError: AccessDenied") as error:
        storage.read_bytes("s3://shards/x")
    assert error.value.kind == ErrorKind.REFUSED and "SECRET" not in str(error.value)


_FAILING_PROGRAM = """
import sys
print("canary-output")
sys.stderr.write("canary-error")
sys.exit({status})
"""
_READ_PROGRAM = """
import logging, sys, traceback
logging.basicConfig(level=logging.DEBUG)
from data_pipeline.common import storage
try:
    storage.read_bytes("s3://shards/x")
except Exception:
    traceback.print_exc()
"""


@pytest.mark.s3
@pytest.mark.parametrize("status", [1, 0])
def test_failing_process(profile: Callable[[str], None], tmp_path: Path, status: int) -> None:
    """Neither what it printed nor the command, which can contain a password."""
    pytest.importorskip("boto3")
    (tmp_path / "fail.py").write_text(_FAILING_PROGRAM.format(status=status))
    profile(f"credential_process = {sys.executable} {tmp_path / 'fail.py'} canary-argument")
    result = _run(_READ_PROGRAM)
    lines = [line for line in result.splitlines() if "StorageError" in line]
    assert len(lines) == 1 and "from the AWS profile 'lab'" in lines[0], result
    assert "cannot read s3://shards/x" in lines[0] and "get-caller-identity" in lines[0]
    assert "canary" not in result


_FAILING_LATER_PROGRAM = """
import datetime, json, os, sys
if os.path.exists(sys.argv[1]):
    sys.stderr.write("canary-error")
    sys.exit(1)
open(sys.argv[1], "w").close()
expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=12)
print(json.dumps({"Version": 1, "AccessKeyId": "canary-key", "SecretAccessKey": "canary-secret",
                  "Expiration": expires.isoformat()}))
"""


@pytest.mark.s3
def test_logs_of_libraries_are_not_shown(profile: Callable[[str], None], tmp_path: Path) -> None:
    """botocore logs what a process printed if it fails when it is called again."""
    pytest.importorskip("boto3")
    (tmp_path / "later.py").write_text(_FAILING_LATER_PROGRAM)
    command = f"{sys.executable} {tmp_path / 'later.py'} {tmp_path / 'called'}"
    profile(f"credential_process = {command}")
    result = _run(_READ_PROGRAM)
    assert "refused access" in result and "canary" not in result


@pytest.mark.parametrize(
    ("scheme", "module", "extra"),
    [
        ("s3", "botocore", "s3"),
        ("s3", "boto3", "s3"),
        ("gs", "google.auth", "gcs"),
        ("az", "azure", "azure"),
    ],
)
def test_missing_library(scheme: str, module: str, extra: str) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from data_pipeline.common.store_providers import make_provider\n"
        f"make_provider({scheme!r}, 'lab')"
    )
    result = _run(program)
    assert f"pip install 'vlmoe[{extra}]'" in result and "During handling" not in result


def _run(program: str) -> str:
    """Output of a Python program."""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    return result.stdout + result.stderr


@pytest.mark.filterwarnings("ignore:The load_credentials_from_file method:DeprecationWarning")
def test_google_files_that_obstore_cannot_read(
    tmp_path: Path, web_server: ReplyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "federation.json"
    env = {"HOME": str(tmp_path), "GOOGLE_APPLICATION_CREDENTIALS": str(file)}
    for known in ("service_account", "authorized_user"):
        file.write_text(json.dumps({"type": known}))
        assert store_credentials.gs_settings(env) == {}
    (tmp_path / "identity").write_text("token of the cluster")
    content = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/x",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": web_server.url,
        "credential_source": {"file": str(tmp_path / "identity")},
    }
    file.write_text(json.dumps(content))
    assert store_credentials.gs_settings(env) == {LIBRARY_SOURCE: str(file)}
    assert store_credentials.gs_settings(env | {"GOOGLE_SERVICE_ACCOUNT": "/key"}) == {}

    pytest.importorskip("google.auth")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    answer = {"access_token": "T", "expires_in": 3600, "token_type": "Bearer"}
    web_server.reply = (200, "application/json", json.dumps(answer))
    client: Any = get_client("gs://bucket/x", 20.0)[0]
    assert client.credential_provider()["token"] == "T" and len(web_server.authorizations) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential"), ("AZURE_USE_AZURE_CLI", "true")],
)
def test_azure_login(
    variable: str,
    value: str,
    tmp_path: Path,
    web_server: ReplyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With azure-identity, and without it by obstore alone."""
    if variable == "AZURE_TOKEN_CREDENTIALS":
        pytest.importorskip("azure.identity")
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    expiry = {"expiresOn": "2099-01-01 00:00:00.000000", "expires_on": 4070908800}
    token = {"accessToken": "T", "tokenType": "Bearer"} | expiry
    (tmp_path / "az").write_text(f"#!/bin/sh\necho '{json.dumps(token)}'\n")
    (tmp_path / "az").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "me")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", web_server.url)
    monkeypatch.setenv(variable, value)
    assert storage.exists("az://container/x")
    assert web_server.authorizations == ["Bearer T"]


def test_azure_keys_have_priority() -> None:
    env = {"AZURE_TOKEN_CREDENTIALS": "dev"}
    assert store_credentials.az_settings(env) == {LIBRARY_SOURCE: "dev"}
    for name in ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET"):
        assert LIBRARY_SOURCE not in store_credentials.az_settings(env | {name: "x"})
    connection = {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=me;AccountKey=a2V5"}
    assert LIBRARY_SOURCE not in store_credentials.az_settings(env | connection)
