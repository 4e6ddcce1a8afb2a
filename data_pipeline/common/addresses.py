"""Secrets in addresses: a user and password, or the signature of a presigned query.

What a run writes (manifests, its settings, ledgers) is copied and shown to others, so no address in
it holds any.
"""

from __future__ import annotations

import re

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.harmless import harmless

_USER = re.compile(r"([a-z0-9+.-]+://)[^/?]*@", re.IGNORECASE)
_QUERY = re.compile(r"(https?://[^?]*)\?.*", re.IGNORECASE | re.DOTALL)

WHERE_KEYS_GO = (
    "put them into ~/.netrc or the file that NETRC names (http), or into the environment: AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY (s3), GOOGLE_APPLICATION_CREDENTIALS (gs), AZURE_STORAGE_ACCOUNT_NAME and "
    "AZURE_STORAGE_ACCOUNT_KEY (az)"
)


def has_user(address: str) -> bool:
    """Whether an address, or one in its braces, says who asks (`user:password@`)."""
    return _USER.search(address) is not None


def has_query(address: str) -> bool:
    """Whether a web address has a query; in names of a store's objects a question mark is a
    wildcard."""
    return _QUERY.search(address) is not None


def without_secrets(address: str) -> str:
    """An address as it may be written down: without user, password and a web address's query."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", address))


def refuse_user(address: str, where: str) -> None:
    """Settings are written into the run's folder, so an address in them must not say who asks.

    Raises:
        ConfigError: It does; the message has the address without.
    """
    if has_user(address):
        raise ConfigError(
            f"{where}: {harmless(without_secrets(address))} was given with a user or password, which "
            f"would be written into files of the run; leave them out, and {WHERE_KEYS_GO}"
        )
