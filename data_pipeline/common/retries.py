"""Trying again: which failures of a store may heal, how long to wait in between, and when to give
up.

Waits grow exponentially with full jitter (anything from nothing to the limit), so that a thousand
workers that failed together do not come back together.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from data_pipeline.common.errors import StorageError
from data_pipeline.common.open_files import is_out_of_files
from data_pipeline.common.store_errors import (
    ASKING_ERRORS,
    Kind,
    WrongAnswerError,
    explained,
    kind_of,
    lacks_credentials,
    redact,
    status_of,
)

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.1
THROTTLED_WAIT_SECONDS = 0.5
"""First wait after "slow down" (429, 503); the library does not show what the store proposes
(`Retry-After`)."""
MAX_WAIT_SECONDS = 8.0
MISSING_TRIES = 4
"""Some stores show a new object late, and some gateways lie: a 404 is believed at the fourth time
in a row."""
NO_RANGES_TRIES = CHANGED_TRIES = 3
CREDENTIAL_TRIES, CREDENTIAL_SECONDS = 3, 5.0
SHORTEST_REQUEST_SECONDS = 0.25
_LEAST_SECONDS = 0.01
_TOLD_SECONDS = 10.0

Result = TypeVar("Result")
_jitter = random.SystemRandom()  # never the run's own generators


class Patience:
    """How long to wait: for one request, and for all tries together since the beginning or the last
    progress."""

    def __init__(
        self,
        total_seconds: float,
        request_seconds: float = 20.0,
        cancel: threading.Event | None = None,
    ) -> None:
        """From now on; `cancel` is set by another thread when the result is no longer wanted."""
        # At most a third for one request, so that there is always a second try.
        self.request_seconds = _halved(request_seconds, total_seconds / 3)
        self.total_seconds, self.cancel = total_seconds, cancel
        self._end = time.monotonic() + total_seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def moved(self) -> None:
        """Something came: the time begins anew."""
        self._end = time.monotonic() + self.total_seconds

    def check_wanted(self, url: str) -> None:
        """Raise StorageError when the result is no longer wanted."""
        if self.cancel is not None and self.cancel.is_set():
            raise StorageError(f"{redact(url)} is no longer wanted")

    def next_request_seconds(self) -> float:
        """Longest wait for a request that begins now.

        One of few lengths (halves of what was given), because each needs a client of its own.
        """
        return _halved(self.request_seconds, max(self.left, SHORTEST_REQUEST_SECONDS))


class Tries:
    """The failures of one piece of work so far."""

    def __init__(self, verb: str, url: str, patience: Patience) -> None:
        self._verb, self._url, self.patience = verb, url, patience
        self._failed, self._in_a_row, self._last = 0, 0, ""
        self.too_slow = False
        """Whether the last failure was that it took too long."""
        self.status = 0
        """HTTP status of the last failure, 0 if it had none."""
        self._started, self._told = time.monotonic(), False

    def failed(self, error: Exception) -> None:
        """Wait until it is time to try again.

        Raises:
            StorageError: It is not worth trying again, time is up, or the result is no longer
            wanted.
        """
        kind = kind_of(error)
        self._failed += 1
        self._in_a_row = self._in_a_row + 1 if kind == self._last else 1
        self._last, self.too_slow, self.status = kind, kind is Kind.TOO_SLOW, status_of(error)
        room = self.patience.left - SHORTEST_REQUEST_SECONDS
        wait = min(self._wait(error, kind), room)
        if self._is_final(error, kind) or room < 0:
            raise explained(self._verb, self._url, error) from None
        logger.debug("%s: %s, try %d; again in %.2f s", redact(self._url), kind, self._failed, wait)
        if not self._told and time.monotonic() - self._started > _TOLD_SECONDS:
            self._told = True
            logger.warning(
                "%s; trying for another %.0f s",
                explained(self._verb, self._url, error),
                self.patience.left,
            )
        if self.patience.cancel is None:
            time.sleep(wait)
        else:
            self.patience.cancel.wait(wait)
        self.patience.check_wanted(self._url)

    def _wait(self, error: Exception, kind: Kind) -> float:
        if kind is Kind.MISSING:
            return math.ldexp(_jitter.uniform(0.025, 0.05), self._in_a_row)
        if kind is Kind.TOO_SLOW:
            return 0.0  # it has been waited for already
        first = THROTTLED_WAIT_SECONDS if self.status in (429, 503) else FIRST_WAIT_SECONDS
        return _jitter.uniform(
            0.0, min(MAX_WAIT_SECONDS, math.ldexp(first, min(self._failed - 1, 10)))
        )

    def _is_final(self, error: Exception, kind: Kind) -> bool:
        if is_out_of_files(error):
            return True  # the caller has some to close
        if kind is Kind.MISSING:
            return self._in_a_row >= MISSING_TRIES or isinstance(error, ValueError)
        if kind is Kind.CHANGED:
            return self._in_a_row >= CHANGED_TRIES
        if kind is Kind.NO_RANGES:
            # Object stores all know ranges: without one this was somebody else's answer.
            return self._url.startswith("http") and self._in_a_row >= NO_RANGES_TRIES
        # Other errors of the client's own (400, 405 ...) stay; 408 and 429 heal.
        wrong = 400 <= self.status < 500 and self.status not in (408, 416, 425, 429)
        if kind is Kind.REFUSED and lacks_credentials(error):
            # A cloud's own service for credentials is asked by every process at once, and may not
            # answer each.
            return (
                self._in_a_row >= CREDENTIAL_TRIES
                or time.monotonic() - self._started > CREDENTIAL_SECONDS
            )
        return kind is Kind.REFUSED or (wrong and self._in_a_row >= MISSING_TRIES)


def _halved(seconds: float, most: float) -> float:
    """`seconds`, halved until they are at most `most`: what is left of a time differs with each
    call."""
    while seconds > max(most, _LEAST_SECONDS):
        seconds /= 2
    return seconds


def ask(verb: str, url: str, patience: Patience, request: Callable[[float], Result]) -> Result:
    """The answer to `request`, which is given the seconds that it may take.

    Raises:
        StorageError: It failed for good; `kind` says how.
    """
    tries = Tries(verb, url, patience)
    while True:
        try:
            return request(patience.next_request_seconds())
        except StorageError:
            raise
        except (*ASKING_ERRORS, WrongAnswerError) as error:
            # `from None` in there: the library's own text may quote signed requests, so it must not
            # be printed.
            tries.failed(error)
