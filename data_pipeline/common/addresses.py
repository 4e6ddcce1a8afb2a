"""Secrets in addresses: user and password, or the signature of a presigned query.

Files that a run writes (manifests, resolved settings, ledgers) are copied and shared, so addresses
are stored in them without secrets.
"""

from __future__ import annotations

import re

from data_pipeline.common.escaping import escape_control

_USERINFO = re.compile(r"([a-z0-9+.-]+://)[^/?]*@", re.IGNORECASE)
_QUERY = re.compile(r"(https?://[^?]*)\?.*", re.IGNORECASE | re.DOTALL)

CREDENTIALS_HINT = (
    "put credentials into ~/.netrc or the file that NETRC names (http), or into the environment: "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (s3), GOOGLE_APPLICATION_CREDENTIALS (gs), "
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (az)"
)


def has_userinfo(address: str) -> bool:
    """Whether an address, or an address inside its braces, contains `user:password@`."""
    return _USERINFO.search(address) is not None


def has_query(address: str) -> bool:
    """Whether an http(s) address has a query; in object names a question mark is a wildcard."""
    return _QUERY.search(address) is not None


def without_secrets(address: str) -> str:
    """The address without user, password and http(s) query, safe to write to a file."""
    return _QUERY.sub(r"\1", _USERINFO.sub(r"\1", address))


def userinfo_problems(address: str, setting: str) -> list[str]:
    """The problem of an address in the settings that has a user or password: settings are saved
    with runs.

    Args:
        address: The address to check; the message shows it without user and password.
        setting: Name of the setting that contains it, for the message.
    """
    if not has_userinfo(address):
        return []
    return [
        f"{setting}: the address {escape_control(without_secrets(address))} contains a user or "
        f"password, which would be written to files of the run; remove it and {CREDENTIALS_HINT}"
    ]
