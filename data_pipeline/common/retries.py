"""Retries of storage requests: which failures are temporary, how long to wait, when to give up.

Waits grow exponentially with full jitter (uniform between zero and the limit), so that many workers
that failed at the same time do not all retry at the same time.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from typing import TypeVar

from data_pipeline.common.deadline import MIN_REQUEST_SECONDS, Deadline
from data_pipeline.common.open_files import is_too_many_open_files
from data_pipeline.common.store_errors import (
    CLIENT_ERRORS,
    ErrorKind,
    InvalidResponseError,
    error_kind,
    lacks_credentials,
    redact,
    status_of,
    to_storage_error,
)

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.1
THROTTLED_WAIT_SECONDS = 0.5
"""First wait after status 429 or 503; obstore does not expose the `Retry-After` header."""
MAX_WAIT_SECONDS = 8.0
MAX_MISSING_ATTEMPTS = 4
"""A 404 is accepted only after this many in a row: some stores show new objects with a delay, and
some gateways return 404 for existing ones."""
MAX_NO_RANGES_ATTEMPTS = MAX_CHANGED_ATTEMPTS = 3
MAX_CREDENTIAL_ATTEMPTS, CREDENTIAL_SECONDS = 3, 5.0
_WARNING_SECONDS = 10.0
"""Log a warning when retries take longer than this."""

Result = TypeVar("Result")
_jitter = random.SystemRandom()  # never the seeded generators of the run


def call_with_retries(
    verb: str, url: str, deadline: Deadline, request: Callable[[float], Result]
) -> Result:
    """Call `request(time_limit_seconds)`, again after temporary failures, and return its result.

    Args:
        verb: What the request does with `url`, for messages: `read`, `write`, `list`.
        url: The object or folder.
        deadline: Time limits.
        request: Called with the seconds that it may take.

    Raises:
        StorageError: It failed permanently, or time ran out; `kind` is the reason.
    """
    retries = RetryState(verb, url, deadline)
    while True:
        try:
            return request(deadline.next_request_seconds())
        except (*CLIENT_ERRORS, InvalidResponseError) as error:
            # Raises without a cause: obstore's message can quote signed requests and must not be
            # printed.
            retries.record_failure(error)


class RetryState:
    """The failures of one operation so far."""

    def __init__(self, verb: str, url: str, deadline: Deadline) -> None:
        self._verb, self._url, self.deadline = verb, url, deadline
        self._failures, self._same_kind, self._last_kind = 0, 0, ""
        self.last_timed_out = False
        """Whether the last failure was a timeout."""
        self.last_status = 0
        """HTTP status of the last failure; 0 if it had none."""
        self._start, self._warned = time.monotonic(), False

    def record_failure(self, error: Exception) -> None:
        """Count a failure and wait before the next attempt.

        Raises:
            StorageError: The failure is permanent, time ran out, or the operation was cancelled.
        """
        kind = error_kind(error)
        self._failures += 1
        self._same_kind = self._same_kind + 1 if kind == self._last_kind else 1
        self._last_kind, self.last_timed_out = kind, kind is ErrorKind.TOO_SLOW
        self.last_status = status_of(error)

        max_wait = self.deadline.remaining_seconds - MIN_REQUEST_SECONDS
        wait = min(self._wait(error, kind), max_wait)
        if self._is_final(error, kind) or max_wait < 0:
            raise to_storage_error(self._verb, self._url, error) from None

        logger.debug(
            "%s: %s, attempt %d; retry in %.2f s", redact(self._url), kind, self._failures, wait
        )
        if not self._warned and time.monotonic() - self._start > _WARNING_SECONDS:
            self._warned = True
            logger.warning(
                "%s; retrying for another %.0f s",
                to_storage_error(self._verb, self._url, error),
                self.deadline.remaining_seconds,
            )
        if self.deadline.cancel is None:
            time.sleep(wait)
        else:
            self.deadline.cancel.wait(wait)
        self.deadline.check_cancelled(self._url)

    def _wait(self, error: Exception, kind: ErrorKind) -> float:
        """Seconds until the next attempt."""
        if kind is ErrorKind.MISSING:
            return math.ldexp(_jitter.uniform(0.025, 0.05), self._same_kind)
        if kind is ErrorKind.TOO_SLOW:
            return 0.0  # the timeout was a wait already
        first = THROTTLED_WAIT_SECONDS if self.last_status in (429, 503) else FIRST_WAIT_SECONDS
        limit = min(MAX_WAIT_SECONDS, math.ldexp(first, min(self._failures - 1, 10)))
        return _jitter.uniform(0.0, limit)

    def _is_final(self, error: Exception, kind: ErrorKind) -> bool:
        """Whether another attempt is pointless."""
        if is_too_many_open_files(error):
            return True  # the caller can close some
        if kind is ErrorKind.MISSING:
            return self._same_kind >= MAX_MISSING_ATTEMPTS or isinstance(error, ValueError)
        if kind is ErrorKind.CHANGED:
            return self._same_kind >= MAX_CHANGED_ATTEMPTS
        if kind is ErrorKind.NO_RANGES:
            # All object stores support ranges: a response without one came from something else.
            return self._url.startswith("http") and self._same_kind >= MAX_NO_RANGES_ATTEMPTS
        if kind is ErrorKind.REFUSED and lacks_credentials(error):
            # All processes ask the cloud's metadata service at once, which may reject some.
            return (
                self._same_kind >= MAX_CREDENTIAL_ATTEMPTS
                or time.monotonic() - self._start > CREDENTIAL_SECONDS
            )
        # Other client errors (400, 405, ...) are permanent; 408 and 429 are temporary.
        client_error = 400 <= self.last_status < 500 and self.last_status not in (
            408,
            416,
            425,
            429,
        )
        return kind is ErrorKind.REFUSED or (
            client_error and self._same_kind >= MAX_MISSING_ATTEMPTS
        )
