"""Clients of object stores: made on first use, kept per process, and never used by a forked child.

A client's threads do not survive `fork`: a forked child that used one would wait for ever, so it is
told so instead. Every client has explicit time-outs and tries nothing again by itself: `retries.py`
does that, because only the caller knows how long a shard may take and what a right answer is.
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
    az_settings,
    gs_settings,
    http_settings,
    s3_settings,
)
from data_pipeline.common.store_errors import ASKING_ERRORS, explained, redact

SCHEMES = ("s3", "gs", "az", "http", "https")
CONNECT_SECONDS = 10.0
MAX_CLIENTS = 128
"""Kept at a time; presigned addresses need one each."""

_BUCKET = re.compile(r"[A-Za-z0-9._-]+")
_HOST = re.compile(r"[][A-Za-z0-9._~!$&'()*+,;=:@%-]+")
_QUERY = re.compile(r"[!-~]*")
_clients: OrderedDict[tuple[object, ...], ObjectStore] = OrderedDict()
_clients_pid: int | None = None
_lock = threading.Lock()


def client_of(
    url: str, request_seconds: float, stall_seconds: float | None = None
) -> tuple[ObjectStore, str]:
    """The client for an address, and the object's name in it.

    Args:
        url: `scheme://host/name`.
        request_seconds: Longest time for one request, its answer included.
        stall_seconds: Longest time without a byte; as long as the request if not given.

    Raises:
        StorageError: This is a forked child of a process that had clients, or the settings make no
        client.
    """
    _check_not_forked()
    scheme, host, name, query = split(url)
    # The library would end in a panic over what cannot stand in an address.
    if not (_HOST if scheme.startswith("http") else _BUCKET).fullmatch(
        host
    ) or not _QUERY.fullmatch(query):
        raise StorageError(
            f"{redact(url)} cannot be an address: look at the name of the bucket or host"
        )
    times = (request_seconds, stall_seconds or request_seconds)
    # Read each time: keys may be renewed while a run goes on. Much of it the library reads by
    # itself.
    settings, environment = _settings(scheme), _environment(scheme)
    known = (scheme, host, query, times, tuple(sorted(settings.items())), environment)
    with _lock:
        if known in _clients:
            _clients.move_to_end(known)
        else:
            try:
                _clients[known] = _client(scheme, host, query, settings, times)
            except ASKING_ERRORS as error:
                raise explained("open", f"{scheme}://{host}", error) from None
            if len(_clients) > MAX_CLIENTS:
                _clients.popitem(last=False)
        return _clients[known], name


def forget_clients() -> None:
    """Make new ones from now on, from the environment as it is then."""
    global _clients_pid
    with _lock:
        _clients.clear()
        _clients_pid = None


def split(url: str) -> tuple[str, str, str, str]:
    """Scheme, host (or bucket), name and query of an address.

    Names in web addresses are percent-encoded; the client does that again, so they are decoded
    here. The names of objects in stores are taken as they are, also with a question mark.
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
            f"process {os.getpid()} was forked from {_clients_pid}, which had already used an object "
            f"store; its client would wait for ever here: start workers with 'forkserver' or 'spawn'"
        )


def _settings(scheme: str) -> dict[str, str]:
    match scheme:
        case "s3":
            return s3_settings()
        case "gs":
            return gs_settings()
        case "az":
            return az_settings()
    return {}


def _environment(scheme: str) -> tuple[tuple[str, str], ...]:
    """The variables that say who we are to a kind of store."""
    prefix = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}.get(scheme)
    return tuple(pair for pair in os.environ.items() if prefix and pair[0].startswith(prefix))


def _client(
    scheme: str, host: str, query: str, settings: dict[str, str], times: tuple[float, float]
) -> ObjectStore:
    options: Any = {
        "timeout": timedelta(seconds=times[0]),
        "read_timeout": timedelta(seconds=times[1]),
        "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, times[0])),
    }
    endpoint = settings.get("endpoint") or settings.get("base_url") or ""
    if scheme == "http" or endpoint.startswith("http://"):
        options["allow_http"] = True
    # Their time-out also bounds the search for credentials.
    retry: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=times[0])}
    more: Any = dict(settings)
    match scheme:
        case "s3":
            return S3Store(host, client_options=options, retry_config=retry, **more)
        case "gs":
            return GCSStore(host, client_options=options, retry_config=retry, **more)
        case "az":
            return AzureStore(host, client_options=options, retry_config=retry, **more)
    host, headers = http_settings(host)
    if headers:
        options["default_headers"] = headers
    # The library adds names to the path of this address and leaves its query alone.
    base = f"{scheme}://{host}" + (f"/?{query}" if query else "")
    return HTTPStore(base, client_options=options, retry_config=retry)
