"""What went wrong in a store: which kind of trouble, whether waiting can heal it, and how it is
said.

The library's own text quotes requests, which can hold keys and signatures; it is looked at, never
shown.
"""

from __future__ import annotations

import re
from enum import StrEnum

from obstore.exceptions import BaseError

from data_pipeline.common.errors import StorageError

ASKING_ERRORS = (BaseError, OSError, ValueError)
"""What obstore raises."""


class Kind(StrEnum):
    """Of trouble; the `kind` of a `StorageError`."""

    MISSING = "missing"
    """There is no such object."""
    REFUSED = "refused"
    """Wrong or no credentials, or an account that may not."""
    UNREACHABLE = "unreachable"
    """No connection, or answers that are errors or cut off."""
    TOO_SLOW = "too-slow"
    """No answer, or not enough of it, in time."""
    CHANGED = "changed"
    """The object is another one than it was a moment ago."""
    NO_RANGES = "no-ranges"
    """A web server that only gives whole files."""


class WrongAnswerError(Exception):
    """An answer that came, but cannot be right; another may be."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


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
_ASKED_FOR_CREDENTIALS = (
    "169.254.169.254",
    "/latest/api/token",
    "metadata.google",
    "/metadata/identity",
    "redential",
)
_REFUSALS = ("PermissionDeniedError", "UnauthenticatedError")
_STATUS = re.compile(r"\b(?:status[^0-9]{1,12}|Server returned non-2xx status code: )([1-5]\d\d)\b")


def status_of(error: Exception) -> int:
    """The HTTP status in an error of the library; 0 where there is none."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def lacks_credentials(error: Exception) -> bool:
    """Whether there was nothing to sign a request with, as far as the library's words tell."""
    text = str(error)
    if type(error).__name__ in _REFUSALS:
        return False
    return (
        any(part in text for part in _ASKED_FOR_CREDENTIALS) or "must be specified" in text.lower()
    )


def kind_of(error: Exception) -> Kind:
    """Which kind of trouble an error of the library, or a `WrongAnswerError`, stands for."""
    if isinstance(error, WrongAnswerError):
        return error.kind
    text, name = str(error), type(error).__name__
    if isinstance(error, (FileNotFoundError, ValueError)):
        return Kind.MISSING
    if name in _REFUSALS or lacks_credentials(error):
        return Kind.REFUSED
    if name == "NotSupportedError":
        return Kind.NO_RANGES
    if status_of(error) == 416:
        return Kind.CHANGED  # it is shorter than expected
    # Looked for in the library's own words alone: a body of an error page may say anything.
    if "TimedOut" in text or "kind: Timeout" in text or "timed out" in text.lower():
        return Kind.TOO_SLOW
    return Kind.UNREACHABLE


def explained(verb: str, url: str, error: Exception) -> StorageError:
    """The error for a person: one line, without quoting the library beyond known-harmless words."""
    kind = kind_of(error)
    return StorageError(f"cannot {verb} {redact(url)}: {_reason(url, error, kind)}", kind=kind)


def redact(url: str) -> str:
    """An address as it may be shown: without user, password and query (presigned URLs carry
    keys)."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = rest.partition("?")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _reason(url: str, error: Exception, kind: Kind) -> str:
    text, scheme = str(error), url.partition("://")[0]
    status = f" (status {found})" if (found := status_of(error)) else ""
    if isinstance(error, WrongAnswerError):
        return error.reason
    if isinstance(error, ValueError):
        return "no object can have that name; names with empty parts or `..` are not supported"
    if kind is Kind.MISSING:
        return "there is no such object; check the address"
    if kind is Kind.REFUSED and "must be specified" in text.lower():
        return f"an account is needed; set {_CREDENTIALS.get(scheme, 'it')} in the environment"
    if kind is Kind.REFUSED and type(error).__name__ in _REFUSALS:
        return f"the store refused access{status}; check the credentials and the bucket's rules"
    if kind is Kind.REFUSED:
        # Without keys the library asks the cloud's own service for some, which other machines do
        # not have.
        return (
            f"no credentials were found; set {_CREDENTIALS.get(scheme, 'them')} in the environment"
        )
    if kind is Kind.NO_RANGES:
        return "the server gives no ranges of a file, only whole ones"
    if kind is Kind.TOO_SLOW:
        return "the store did not answer in time; look at the network, or raise data.request_seconds and shard_seconds"
    if kind is Kind.CHANGED:
        return f"it is shorter than expected{status}"
    if any(
        part in text
        for part in ("Connection refused", "ConnectionRefused", "dns error", "tcp connect")
    ):
        endpoint = f" ({_ENDPOINTS[scheme]})" if scheme in _ENDPOINTS else ""
        return f"the store cannot be reached; check the network and the endpoint{endpoint}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "response body" in text or "error sending request" in text:
        return "the connection broke again and again; look at the network or the store"
    return f"the store answered with {type(error).__name__}{status}"
