"""Time limit and error report of one rank.

A rank that fails or hangs blocks the others in collectives. It therefore writes an error report and
exits at once; the launcher then terminates the other ranks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.parity.job import MessageLog

EXIT_TIMEOUT, EXIT_ERROR = 3, 4
"""Exit statuses of a rank whose case exceeded the time limit, or failed."""
MAX_REASON = 2000
"""Characters of a reason in an error report."""


class Deadline:
    """Limits the time of each case on this rank."""

    def __init__(self, rank: int, folder: str, seconds: float) -> None:
        self._rank, self._folder, self._seconds = rank, Path(folder), seconds

    @contextmanager
    def limit(self, case: int, task: str) -> Iterator[None]:
        """Exit the process with an error report if the block fails or takes too long.

        Args:
            case: Index of the case, for the report.
            task: Description of the block, for the report.
        """
        timer = threading.Timer(self._seconds, self._time_out, (case, task))
        timer.daemon = True
        timer.start()
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - the other ranks wait for this one
            reason = f"{type(error).__name__}: {error}"
            self._report(case, "error", f"rank {self._rank}, {task}: {reason}")
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(EXIT_ERROR)  # threads of the process group may hang too
        finally:
            timer.cancel()

    def _time_out(self, case: int, task: str) -> None:
        location = _current_location(sys._current_frames()[threading.main_thread().ident or 0])
        self._report(
            case,
            "hang",
            f"rank {self._rank}, {task}: timed out after {self._seconds:g} s in {location}",
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_TIMEOUT)

    def _report(self, case: int, status: str, reason: str) -> None:
        reason = reason if len(reason) < MAX_REASON else reason[:MAX_REASON] + " ..."
        print(f"error: {reason}", file=sys.stderr, flush=True)
        folder = self._folder / f"rank-{self._rank:05d}"
        folder.mkdir(exist_ok=True)
        MessageLog(folder).add({"case": case, "status": status, "reason": reason})


def _current_location(frame: Any) -> str:
    """The innermost frame of the training code, otherwise the innermost frame."""
    frames = traceback.extract_stack(frame)
    training = [
        entry
        for entry in frames
        if "/pretrain/" in entry.filename and "/parity/" not in entry.filename
    ]
    entry = (training or frames)[-1]
    return f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})"
