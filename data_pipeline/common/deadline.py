"""Time limits of a storage operation: for each request, and for all attempts together."""

from __future__ import annotations

import threading
import time

from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_errors import redact

MIN_REQUEST_SECONDS = 0.25
_MIN_SECONDS = 0.01


class Deadline:
    """Time limits for one request, and for all attempts since the start or the last progress."""

    def __init__(
        self,
        total_seconds: float,
        request_seconds: float = 20.0,
        cancel: threading.Event | None = None,
    ) -> None:
        """Start the clock.

        Args:
            total_seconds: Limit for all attempts together, since the start or the last `restart`.
            request_seconds: Limit for one request.
            cancel: Set by another thread when the result is no longer needed.
        """
        # At most a third for one request, so that there is time for further attempts.
        self.request_seconds = _halve_to(request_seconds, total_seconds / 3)
        self.total_seconds, self.cancel = total_seconds, cancel
        self._end = time.monotonic() + total_seconds

    @property
    def remaining_seconds(self) -> float:
        """Seconds until the limit for all attempts; negative after it."""
        return self._end - time.monotonic()

    def restart(self) -> None:
        """Start the limit for all attempts again, after progress."""
        self._end = time.monotonic() + self.total_seconds

    def check_cancelled(self, url: str) -> None:
        """Raise StorageError if the result is no longer needed."""
        if self.cancel is not None and self.cancel.is_set():
            raise StorageError(f"reading or writing {redact(url)} was cancelled")

    def next_request_seconds(self) -> float:
        """Time limit for a request that starts now.

        It is `request_seconds` divided by a power of two. This keeps the number of distinct values
        small, because each needs its own client.
        """
        return _halve_to(self.request_seconds, max(self.remaining_seconds, MIN_REQUEST_SECONDS))


def _halve_to(seconds: float, limit: float) -> float:
    """`seconds`, halved until it is at most `limit`."""
    while seconds > max(limit, _MIN_SECONDS):
        seconds /= 2
    return seconds
