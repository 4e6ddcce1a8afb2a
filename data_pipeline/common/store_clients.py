"""Clients of object stores: created on first use, one set per process, unusable after a fork.

The threads of a client do not survive `fork`: a forked child that used one would hang, so it gets
an error instead. Every client has explicit timeouts and no retries: `retries.py` does these,
because only the caller knows how long an operation may take and what a valid response is.
"""

from __future__ import annotations

import os
import re
import threading
import urllib.parse
from collections import OrderedDict
from datetime import timedelta
from typing import Any

from obstore.store import AzureStore, GCSStore, HTTPStore, ObjectStore, S3Store

from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_credentials import (
    LIBRARY_SOURCE,
    az_settings,
    gs_settings,
    http_settings,
    s3_settings,
)
from data_pipeline.common.store_errors import CLIENT_ERRORS, redact, to_storage_error
from data_pipeline.common.store_providers import Provider, make_provider

SCHEMES = ("s3", "gs", "az", "http", "https")
CONNECT_SECONDS = 10.0
MAX_CLIENTS = 128
"""Maximum number of cached clients; every presigned address needs its own."""

_BUCKET = re.compile(r"[A-Za-z0-9._-]+")
_HOST = re.compile(r"[][A-Za-z0-9._~!$&'()*+,;=:@%-]+")
_QUERY = re.compile(r"[!-~]*")
_clients: OrderedDict[tuple[object, ...], ObjectStore] = OrderedDict()
_providers: dict[tuple[object, ...], Provider] = {}
_clients_pid: int | None = None
_lock = threading.Lock()


def get_client(
    url: str, request_seconds: float, stall_seconds: float | None = None
) -> tuple[ObjectStore, str]:
    """The client for an address, and the object's name for that client.

    Args:
        url: `scheme://host/name`.
        request_seconds: Timeout of a request, including its response.
        stall_seconds: Maximum time without receiving a byte; None is `request_seconds`.

    Raises:
        StorageError: This process was forked from one that had clients, the address is invalid, or
            no client can be created from the settings.
        CredentialsError: A library could not obtain credentials.
    """
    _check_not_forked()
    scheme, host, name, query = split_url(url)
    # obstore panics on characters that are not allowed in an address.
    valid_host = (_HOST if scheme.startswith("http") else _BUCKET).fullmatch(host)
    if not valid_host or not _QUERY.fullmatch(query):
        raise StorageError(
            f"{redact(url)} is not a valid address: check the name of the bucket or host"
        )

    timeouts = (request_seconds, stall_seconds or request_seconds)
    # Read at every call, because credentials can be renewed during a run. The environment is part
    # of the key because obstore reads many variables itself.
    settings, environment = _settings(scheme), _environment(scheme)
    cache_key = (scheme, host, query, timeouts, tuple(sorted(settings.items())), environment)
    if source := settings.pop(LIBRARY_SOURCE, ""):
        provider = _provider(scheme, source, environment)
        provider()  # obstore would hide the reason of a failure
        settings["credential_provider"] = provider
    with _lock:
        if cache_key in _clients:
            _clients.move_to_end(cache_key)
        else:
            try:
                _clients[cache_key] = _client(scheme, host, query, settings, timeouts)
            except CLIENT_ERRORS as error:
                raise to_storage_error("open", f"{scheme}://{host}", error) from None
            if len(_clients) > MAX_CLIENTS:
                _clients.popitem(last=False)
        return _clients[cache_key], name


def clear_clients() -> None:
    """Drop all cached clients; new ones are created from the current environment."""
    global _clients_pid
    with _lock:
        _clients.clear()
        _providers.clear()
        _clients_pid = None


def split_url(url: str) -> tuple[str, str, str, str]:
    """Scheme, host (or bucket), name and query of an address.

    Names in http(s) addresses are percent-encoded; they are decoded here because the client encodes
    them again. Names of objects in stores are used unchanged, including question marks.
    """
    scheme, _, rest = url.partition("://")
    host, _, name = rest.partition("/")
    if scheme not in ("http", "https"):
        return scheme, host, name, ""
    name, _, query = name.partition("?")
    return scheme, host, urllib.parse.unquote(name), query


def _check_not_forked() -> None:
    global _clients_pid
    if _clients_pid is None:
        _clients_pid = os.getpid()
    elif _clients_pid != os.getpid():
        raise StorageError(
            f"process {os.getpid()} was forked from {_clients_pid}, which had already used an "
            f"object store; clients hang after a fork: start workers with 'forkserver' or 'spawn'"
        )


def _settings(scheme: str) -> dict[str, Any]:
    match scheme:
        case "s3":
            return s3_settings()
        case "gs":
            return gs_settings()
        case "az":
            return az_settings()
    return {}


def _provider(scheme: str, source: str, environment: tuple[tuple[str, str], ...]) -> Provider:
    """The provider of credentials that all clients of a source share."""
    key = (scheme, source, environment)
    with _lock:
        if key not in _providers:
            _providers[key] = make_provider(scheme, source)
        return _providers[key]


def _environment(scheme: str) -> tuple[tuple[str, str], ...]:
    """The environment variables that can hold credentials for a kind of store."""
    prefix = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}.get(scheme)
    return tuple(pair for pair in os.environ.items() if prefix and pair[0].startswith(prefix))


def _client(
    scheme: str, host: str, query: str, settings: dict[str, Any], timeouts: tuple[float, float]
) -> ObjectStore:
    options: Any = {
        "timeout": timedelta(seconds=timeouts[0]),
        "read_timeout": timedelta(seconds=timeouts[1]),
        "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, timeouts[0])),
    }
    endpoint = settings.get("endpoint") or settings.get("base_url") or ""
    if scheme == "http" or endpoint.startswith("http://"):
        options["allow_http"] = True
    # The retry timeout also limits the search for credentials.
    retry: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=timeouts[0])}
    match scheme:
        case "s3":
            return S3Store(host, client_options=options, retry_config=retry, **settings)
        case "gs":
            return GCSStore(host, client_options=options, retry_config=retry, **settings)
        case "az":
            return AzureStore(host, client_options=options, retry_config=retry, **settings)
    host, headers = http_settings(host)
    if headers:
        options["default_headers"] = headers
    # obstore appends object names to the path of this address and keeps its query.
    base = f"{scheme}://{host}" + (f"/?{query}" if query else "")
    return HTTPStore(base, client_options=options, retry_config=retry)
