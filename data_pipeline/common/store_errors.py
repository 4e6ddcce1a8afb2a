"""Errors of object stores: their kinds, and messages without secrets.

obstore's own messages quote requests, which can contain keys and signatures. They are searched for
known phrases, but never shown.
"""

from __future__ import annotations

import re
from enum import StrEnum

from obstore.exceptions import BaseError

from data_pipeline.common.errors import StorageError

CLIENT_ERRORS = (BaseError, OSError, ValueError)
"""The exceptions of obstore."""


class ErrorKind(StrEnum):
    """What went wrong; the `kind` of a `StorageError`."""

    MISSING = "missing"
    """The object does not exist."""
    REFUSED = "refused"
    """Credentials are missing or wrong, or lack permission."""
    UNREACHABLE = "unreachable"
    """No connection, error responses, or truncated responses."""
    TOO_SLOW = "too-slow"
    """No response, or not enough of it, within the time limit."""
    CHANGED = "changed"
    """The object was replaced while it was read, or is not the expected one."""
    NO_RANGES = "no-ranges"
    """The web server does not support range requests."""


class InvalidResponseError(Exception):
    """A response that cannot be right; another attempt may succeed."""

    def __init__(self, kind: ErrorKind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class CredentialsError(InvalidResponseError):
    """A library could not obtain credentials; another attempt may succeed."""


_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN)",
}
_ENDPOINTS = {
    "s3": "AWS_ENDPOINT_URL",
    "gs": "STORAGE_EMULATOR_HOST",
    "az": "AZURE_STORAGE_ENDPOINT",
}
_CREDENTIAL_PHRASES = (
    "169.254.169.254",
    "/latest/api/token",
    "metadata.google",
    "/metadata/identity",
    "redential",  # upper or lower case
)
_PROVIDER_PHRASE = "credential provider"  # obstore's, if a `store_providers.Provider` failed
_CONNECTION_PHRASES = ("Connection refused", "ConnectionRefused", "dns error", "tcp connect")
_REFUSALS = ("PermissionDeniedError", "UnauthenticatedError")
_STATUS = re.compile(r"\b(?:status[^0-9]{1,12}|Server returned non-2xx status code: )([1-5]\d\d)\b")


def status_of(error: Exception) -> int:
    """The HTTP status in an exception of obstore; 0 if there is none."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else 0


def lacks_credentials(error: Exception) -> bool:
    """Whether no credentials were found, according to obstore's message."""
    text = str(error)
    if isinstance(error, CredentialsError):
        return True
    if type(error).__name__ in _REFUSALS:
        return _PROVIDER_PHRASE in text
    return (
        any(phrase in text for phrase in _CREDENTIAL_PHRASES) or "must be specified" in text.lower()
    )


def error_kind(error: Exception) -> ErrorKind:
    """The kind of an exception of obstore or an `InvalidResponseError`."""
    if isinstance(error, InvalidResponseError):
        return error.kind
    text, name = str(error), type(error).__name__
    if isinstance(error, (FileNotFoundError, ValueError)):
        return ErrorKind.MISSING
    if name in _REFUSALS or lacks_credentials(error):
        return ErrorKind.REFUSED
    if name == "NotSupportedError":
        return ErrorKind.NO_RANGES
    if status_of(error) == 416:
        return ErrorKind.CHANGED  # the object is shorter than the range
    # Only phrases that obstore itself adds: the body of an error page can contain any text.
    if "TimedOut" in text or "kind: Timeout" in text or "timed out" in text.lower():
        return ErrorKind.TOO_SLOW
    return ErrorKind.UNREACHABLE


def to_storage_error(verb: str, url: str, error: Exception) -> StorageError:
    """A one-line error for users that does not quote obstore."""
    kind = error_kind(error)
    return StorageError(f"cannot {verb} {redact(url)}: {_reason(url, error, kind)}", kind=kind)


def redact(url: str) -> str:
    """An address without user, password and query (presigned URLs contain a signature)."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = rest.partition("?")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _reason(url: str, error: Exception, kind: ErrorKind) -> str:
    text, scheme = str(error), url.partition("://")[0]
    number = status_of(error)
    status = f" (status {number})" if number else ""
    if isinstance(error, InvalidResponseError):
        return error.reason
    if isinstance(error, ValueError):
        return "no object can have that name; names with empty parts or `..` are not supported"
    if kind is ErrorKind.MISSING:
        return "there is no such object; check the address"
    if kind is ErrorKind.REFUSED:
        return _refusal(scheme, error, status)
    if kind is ErrorKind.NO_RANGES:
        return "the server does not support range requests"
    if kind is ErrorKind.TOO_SLOW:
        return (
            "the store did not answer in time; check the network, or raise data.request_seconds "
            "and data.shard_seconds"
        )
    if kind is ErrorKind.CHANGED:
        return f"it is shorter than expected{status}"
    if any(phrase in text for phrase in _CONNECTION_PHRASES):
        endpoint = f" ({_ENDPOINTS[scheme]})" if scheme in _ENDPOINTS else ""
        return f"the store cannot be reached; check the network and the endpoint{endpoint}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "response body" in text or "error sending request" in text:
        return "the connection broke repeatedly; check the network and the store"
    return f"the store answered with {type(error).__name__}{status}"


def _refusal(scheme: str, error: Exception, status: str) -> str:
    if "must be specified" in str(error).lower():
        return f"an account is needed; set {_CREDENTIALS.get(scheme, 'it')} in the environment"
    if _PROVIDER_PHRASE in str(error):
        return "the credentials expired and could not be renewed"
    if type(error).__name__ in _REFUSALS:
        return f"the store refused access{status}; check the credentials and the bucket's policy"
    # Without keys, obstore asks the cloud's metadata service, which exists only on cloud machines.
    return f"no credentials were found; set {_CREDENTIALS.get(scheme, 'them')} in the environment"
