"""One request for (a part of) an object, and what is checked about its answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import obstore

from data_pipeline.common.retries import Patience
from data_pipeline.common.store_clients import client_of
from data_pipeline.common.store_errors import Kind, WrongAnswerError


class ObjectInfo(NamedTuple):
    """What a store says about an object; -1 and empty where it is not known."""

    size: int
    etag: str


def checked_info(url: str, size: int, etag: str | None) -> ObjectInfo:
    """What a store's answer says.

    Raises:
        WrongAnswerError: It does not come from the store: they all give ETags.
    """
    if not etag and not url.startswith("http"):
        raise WrongAnswerError(
            Kind.UNREACHABLE, "something between here and the store answers instead of it"
        )
    return ObjectInfo(size, etag or "")


def one_answer(
    url: str, start: int, end: int, expected: ObjectInfo, patience: Patience
) -> tuple[memoryview, ObjectInfo]:
    """One checked request, and what it is a part of.

    Args:
        url: The object.
        start: First byte.
        end: After the last; -1 asks for the whole object without a range.
        expected: What the object must be, as far as that is known.
        patience: How long to wait.

    Raises:
        StorageError: The result is no longer wanted.
        WrongAnswerError: It came, but cannot be right. Other errors are the library's.
    """
    patience.check_wanted(url)
    store, name = client_of(url, patience.next_request_seconds())
    options: Any = None if end < 0 else {"range": (start, end)}
    answer = obstore.get(store, name, options=options)
    info = checked_info(url, answer.meta["size"], answer.meta["e_tag"])
    check_same(expected, info)
    data = memoryview(answer.bytes())
    wanted = (info.size if end < 0 else min(end, info.size)) - start
    if len(data) != wanted:
        raise WrongAnswerError(
            Kind.UNREACHABLE, f"it came with {len(data)} of {wanted} bytes at {start}"
        )
    return data, info


def check_same(expected: ObjectInfo, found: ObjectInfo) -> None:
    """Compare what an answer is of with what is expected, as far as that is known.

    Raises:
        WrongAnswerError: They differ.
    """
    if expected.size >= 0 and found.size != expected.size:
        raise WrongAnswerError(
            Kind.CHANGED, f"it has {found.size} bytes, but {expected.size} were expected"
        )
    if expected.etag and found.etag != expected.etag:
        raise WrongAnswerError(Kind.CHANGED, "it changed while it was read")
