"""Single requests to an object store, and checks of the responses."""

from __future__ import annotations

from typing import Any, NamedTuple

import obstore

from data_pipeline.common.deadline import Deadline
from data_pipeline.common.store_clients import get_client
from data_pipeline.common.store_errors import ErrorKind, InvalidResponseError


class ObjectInfo(NamedTuple):
    """Size in bytes and ETag of an object; -1 and empty where they are not known."""

    size: int
    etag: str


def validate_info(url: str, size: int, etag: str | None) -> ObjectInfo:
    """Check the metadata of a response.

    Raises:
        InvalidResponseError: It has no ETag, so it does not come from the store: all stores send
            one.
    """
    if not etag and not url.startswith("http"):
        raise InvalidResponseError(
            ErrorKind.UNREACHABLE, "the response has no ETag; a proxy may have sent it"
        )
    return ObjectInfo(size, etag or "")


def request_range(
    url: str, start: int, end: int, expected: ObjectInfo, deadline: Deadline
) -> tuple[memoryview, ObjectInfo]:
    """Request a range of bytes once and check the response.

    Args:
        url: The object.
        start: First byte.
        end: End of the range, exclusive; -1 requests the whole object without a range.
        expected: Size and ETag that the object must have, where they are known.
        deadline: Time limits.

    Returns:
        The bytes, and size and ETag of the object.

    Raises:
        StorageError: The operation was cancelled.
        InvalidResponseError: The response cannot be right. Other errors are those of obstore.
    """
    deadline.check_cancelled(url)
    store, name = get_client(url, deadline.next_request_seconds())
    options: Any = None if end < 0 else {"range": (start, end)}
    response = obstore.get(store, name, options=options)

    info = validate_info(url, response.meta["size"], response.meta["e_tag"])
    check_unchanged(expected, info)
    data = memoryview(response.bytes())
    expected_bytes = (info.size if end < 0 else min(end, info.size)) - start
    if len(data) != expected_bytes:
        raise InvalidResponseError(
            ErrorKind.UNREACHABLE,
            f"the response has {len(data)} of {expected_bytes} bytes at offset {start}",
        )
    return data, info


def check_unchanged(expected: ObjectInfo, actual: ObjectInfo) -> None:
    """Compare the object of a response with the expected one, where that is known.

    Raises:
        InvalidResponseError: They differ.
    """
    if expected.size >= 0 and actual.size != expected.size:
        raise InvalidResponseError(
            ErrorKind.CHANGED, f"it has {actual.size} bytes, but {expected.size} were expected"
        )
    if expected.etag and actual.etag != expected.etag:
        raise InvalidResponseError(ErrorKind.CHANGED, "it changed while it was read")
