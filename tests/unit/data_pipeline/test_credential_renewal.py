"""`Provider`: when credentials are renewed, and what happens if that fails."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from data_pipeline.common import store_providers
from data_pipeline.common.store_errors import (
    CredentialsError,
    ErrorKind,
    lacks_credentials,
    to_storage_error,
)
from data_pipeline.common.store_providers import Provider


class TransportError(Exception):
    """Named as google-auth's."""


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ValueError("SECRET"), ErrorKind.REFUSED),
        (OSError("SECRET"), ErrorKind.REFUSED),
        (TransportError("SECRET"), ErrorKind.UNREACHABLE),
        (ConnectionResetError("SECRET"), ErrorKind.UNREACHABLE),
        (TimeoutError("SECRET"), ErrorKind.TOO_SLOW),
    ],
)
def test_kinds_of_failures(failure: Exception, kind: ErrorKind) -> None:
    with pytest.raises(CredentialsError, match=r"from a file .*; do it") as error:
        Provider(_Fetch(failure), "a file", "do it")()
    assert error.value.kind == kind
    assert "SECRET" not in str(error.value) and error.value.__suppress_context__


def test_failure_during_a_request() -> None:
    """obstore asks between two requests of an upload, for example; its message has the cause."""
    provider: Any = Provider(_Fetch(OSError("SECRET")), "a file", "do it")
    with pytest.raises(BaseError) as error:
        obstore.head(S3Store("bucket", region="us-east-1", credential_provider=provider), "x")
    assert lacks_credentials(error.value), "another attempt reports the cause"
    reported = to_storage_error("read", "s3://bucket/x", error.value)
    assert reported.kind == ErrorKind.REFUSED and "could not be renewed" in str(reported)
    assert "SECRET" not in str(error.value)


def test_a_hanging_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_providers, "FETCH_SECONDS", 0.1)
    ended = threading.Event()

    def hang() -> dict[str, Any]:
        ended.wait(60)
        return {"token": "T", "expires_at": None}

    with pytest.raises(CredentialsError, match="no answer") as error:
        Provider(hang, "a file", "do it")()
    ended.set()
    assert error.value.kind == ErrorKind.TOO_SLOW


def test_failed_renewal_keeps_valid_credentials() -> None:
    fetch = _Fetch(_token("first", 1.2), OSError("SECRET"), OSError("SECRET"), _token("next", 60))
    provider = Provider(fetch, "a file", "do it")
    assert provider()["token"] == provider()["token"] == "first" and fetch.calls == 1
    time.sleep(1.05)  # it is renewed after 70 to 85 % of the time
    assert provider()["token"] == provider()["token"] == "first" and fetch.calls == 2
    time.sleep(0.2)
    with pytest.raises(CredentialsError):
        provider()
    assert provider()["token"] == "next" and fetch.calls == 4


def test_credentials_without_expiry_and_expired_ones() -> None:
    fetch = _Fetch({"token": "T", "expires_at": None})
    provider = Provider(fetch, "a file", "do it")
    assert provider() == provider() == {"token": "T", "expires_at": None} and fetch.calls == 1
    with pytest.raises(CredentialsError, match="expired") as error:
        Provider(_Fetch(_token("old", -1)), "a file", "do it")()
    assert error.value.kind == ErrorKind.REFUSED


def _token(token: str, seconds: float) -> dict[str, Any]:
    return {"token": token, "expires_at": datetime.now(UTC) + timedelta(seconds=seconds)}


class _Fetch:
    """Returns or raises the given results, one per call."""

    def __init__(self, *results: dict[str, Any] | Exception) -> None:
        self.results, self.calls = results, 0

    def __call__(self) -> dict[str, Any]:
        result = self.results[self.calls]
        self.calls += 1
        if isinstance(result, Exception):
            raise result
        return result
