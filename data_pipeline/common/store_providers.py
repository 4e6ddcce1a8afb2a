"""Credentials of object stores from the libraries of the clouds, where obstore cannot find them.

- s3: botocore, for AWS profiles with SSO, a `credential_process` or a role of another profile.
- gs: google-auth, for credential files of workload identity federation or impersonation.
- az: azure-identity, if `AZURE_TOKEN_CREDENTIALS` is set.

The libraries are optional. Their exceptions and logs can quote secrets, so neither is ever shown.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_errors import CredentialsError, ErrorKind

logger = logging.getLogger(__name__)

FETCH_SECONDS = 30.0
"""Time limit for a library: a `credential_process` that asks for a password would never end."""
RETRY_SECONDS = 15.0
"""Wait after credentials could not be renewed while the current ones are still valid."""
GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_LOGGERS = ("botocore", "boto3", "google.auth", "azure", "msal")
_CONNECTION_ERRORS = {
    *("ConnectionError", "HTTPClientError"),  # botocore
    "TransportError",  # google-auth
    *("ServiceRequestError", "ServiceResponseError"),  # azure-identity
}
_jitter = random.SystemRandom()  # never the seeded generators of the run

Credential = dict[str, Any]
"""What obstore expects of a provider, with the true end of validity as `expires_at`, or None."""


class _Library(NamedTuple):
    package: str
    extra: str
    load: Callable[[str], Callable[[], Credential]]
    """Imports the library; returns the function that fetches credentials of a source."""
    source: str
    hint: str


class Provider:
    """Credentials of one source, for all clients that use it; renewed before they expire.

    obstore calls the object before each request whose credentials have reached `expires_at`.
    """

    refresh_threshold = timedelta(0)  # obstore asks again at `expires_at`, not minutes earlier

    def __init__(self, fetch: Callable[[], Credential], source: str, hint: str) -> None:
        """Create the provider without fetching anything.

        Args:
            fetch: Returns new credentials; any exception is a failure.
            source: Where the credentials come from, for messages.
            hint: What to do if that fails, for messages.
        """
        self._fetch, self._source, self._hint = fetch, source, hint
        self._lock = threading.Lock()
        self._current: Credential | None = None
        self._renew_at: datetime | None = None

    def __call__(self) -> Credential:
        """Valid credentials; `expires_at` is when they should be asked for again, or None.

        Raises:
            CredentialsError: There are none.
        """
        with self._lock:
            now = datetime.now(UTC)
            if self._current is None or (self._renew_at is not None and now >= self._renew_at):
                self._renew(now)
            assert self._current is not None
            return {**self._current, "expires_at": self._renew_at}

    def _renew(self, now: datetime) -> None:
        try:
            new = self._fetch_checked()
        except CredentialsError as error:
            expires_at = self._current["expires_at"] if self._current else None
            if expires_at is None or expires_at <= datetime.now(UTC):
                raise
            logger.warning("%s; the current ones are valid until %s", error.reason, expires_at)
            self._renew_at = min(expires_at, now + timedelta(seconds=RETRY_SECONDS))
            return
        self._current, expires_at = new, new["expires_at"]
        # At a random time, so that the processes of a run do not all ask at once.
        self._renew_at = expires_at and now + (expires_at - now) * _jitter.uniform(0.7, 0.85)

    def _fetch_checked(self) -> Credential:
        """Fetch new credentials within the time limit."""
        try:
            credential = _call_within(FETCH_SECONDS, self._fetch)
        except TimeoutError:
            raise self._error(ErrorKind.TOO_SLOW, f"no answer in {FETCH_SECONDS:g} s") from None
        except Exception as error:  # noqa: BLE001 - every message of a library can hold a secret
            kind = ErrorKind.UNREACHABLE if _is_temporary(error) else ErrorKind.REFUSED
            raise self._error(kind, _name(error)) from None
        expires_at = credential["expires_at"]
        if expires_at is not None and expires_at <= datetime.now(UTC):
            raise self._error(ErrorKind.REFUSED, "they have expired")
        return credential

    def _error(self, kind: ErrorKind, reason: str) -> CredentialsError:
        return CredentialsError(
            kind, f"no credentials could be obtained from {self._source} ({reason}); {self._hint}"
        )


def make_provider(scheme: str, name: str) -> Provider:
    """The provider for a kind of store.

    Args:
        scheme: `s3`, `gs` or `az`.
        name: AWS profile, path of Google's credential file, or value of `AZURE_TOKEN_CREDENTIALS`.

    Raises:
        StorageError: The library is not installed.
    """
    library = _LIBRARIES[scheme]
    source = library.source.format(name=name)
    try:
        fetch = library.load(name)
    except ImportError:
        raise StorageError(
            f"credentials from {source} need the package {library.package}, which is not "
            f"installed; run `pip install 'vlmoe[{library.extra}]'`",
            kind=ErrorKind.REFUSED,
        ) from None
    for logger_name in _LOGGERS:
        logging.getLogger(logger_name).setLevel(logging.CRITICAL + 1)
    return Provider(fetch, source, library.hint.format(name=name))


def _load_botocore(profile: str) -> Callable[[], Credential]:
    from botocore.session import Session
    from obstore.auth.boto3 import Boto3CredentialProvider

    def fetch() -> Credential:
        # A new session each time reads changed files, for example after `aws sso login`.
        session = Session(profile=profile)
        if not session.get_config_variable("region"):  # it does not read AWS_REGION
            session.set_config_variable("region", os.environ.get("AWS_REGION") or "us-east-1")
        provider = Boto3CredentialProvider(session)
        credential = provider()
        # The `expires_at` of obstore's provider is a guess; botocore has no public access to it.
        expires_at = getattr(provider.credentials, "_expiry_time", None)
        return {**credential, "expires_at": expires_at}

    return fetch


def _load_google(path: str) -> Callable[[], Credential]:
    from google.auth import load_credentials_from_file
    from google.auth.transport.requests import Request
    from obstore.auth.google import GoogleCredentialProvider

    def fetch() -> Credential:
        credentials, _ = load_credentials_from_file(path, scopes=[GOOGLE_SCOPE])
        return {**GoogleCredentialProvider(credentials, request=Request())()}

    return fetch


def _load_azure(_: str) -> Callable[[], Credential]:
    from obstore.auth.azure import AzureCredentialProvider

    return lambda: {**AzureCredentialProvider()()}  # reads AZURE_TOKEN_CREDENTIALS itself


_LIBRARIES = {
    "s3": _Library(
        "boto3",
        "s3",
        _load_botocore,
        "the AWS profile {name!r}",
        "`aws sts get-caller-identity --profile {name}` shows why; if the profile uses SSO, run "
        "`aws sso login --profile {name}`",
    ),
    "gs": _Library(
        "google-auth",
        "gcs",
        _load_google,
        "the Google credential file {name}",
        "`gcloud auth application-default print-access-token` shows why",
    ),
    "az": _Library(
        "azure-identity",
        "azure",
        _load_azure,
        "azure-identity (AZURE_TOKEN_CREDENTIALS={name})",
        "log in, for example with `az login`, or set AZURE_TOKEN_CREDENTIALS to the kind of "
        "credentials that this machine has",
    ),
}


def _call_within(seconds: float, function: Callable[[], Credential]) -> Credential:
    """Call a function in a thread, which is abandoned after the time limit."""
    future = Future[Credential]()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - `result` raises it
            future.set_exception(error)

    threading.Thread(target=run, name="credentials", daemon=True).start()
    return future.result(seconds)


def _is_temporary(error: Exception) -> bool:
    """Whether an exception of a library means that its server was not reached or is overloaded."""
    names = {cls.__name__ for cls in type(error).__mro__}
    code, status = _answer(error)
    return (
        bool(names & _CONNECTION_ERRORS)
        or getattr(error, "retryable", False) is True  # google-auth
        or "Throttl" in code
        or status == 429
        or status >= 500
    )


def _name(error: Exception) -> str:
    """The kind of an exception without its message, with the code of a botocore `ClientError`."""
    code, _ = _answer(error)
    valid = re.fullmatch(r"[A-Za-z.]{1,60}", code)
    return type(error).__name__ + (f": {code}" if valid else "")


def _answer(error: Exception) -> tuple[str, int]:
    """Code and HTTP status of a botocore `ClientError`; empty and 0 for other exceptions."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return "", 0
    code = response.get("Error", {}).get("Code", "")
    return str(code), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
