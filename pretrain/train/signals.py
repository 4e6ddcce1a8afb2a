"""Stop signals: all that mean the end of a run, such as SIGTERM (torchrun, scancel), SIGUSR1
(SLURM, before the time limit), SIGHUP (the terminal is closed) and Ctrl-C."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
REPEAT_SECONDS = 5.0
"""A second signal within this time is the same one: `scancel` signals torchrun, which forwards."""


class StopFlag:
    """Context manager in which a stop signal sets a flag; the loop stops after the current step.

    A second Ctrl-C, or a second signal that comes later, raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._first_time = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            # A shell starts background jobs with SIGINT ignored, nohup with SIGHUP: it stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._set)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_repeated = now - self._first_time < REPEAT_SECONDS and number != signal.SIGINT
        if self.is_set and not is_repeated:
            raise KeyboardInterrupt
        if not self.is_set:
            self.is_set, self._first_time = True, now
