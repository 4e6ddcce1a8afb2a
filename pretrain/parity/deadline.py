"""Time limit of one rank's task, and the message of a rank that fails.

A rank that fails or hangs blocks the others in collectives. It therefore writes a message and exits
at once; the launcher then terminates the other ranks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pretrain.parity.job import append_message

EXIT_STATUS = 3
"""Of a rank whose task failed or exceeded the time limit."""
MAX_REASON = 2000
"""Characters of the reason in a message."""


@contextmanager
def time_limit(seconds: float, task: str, messages: Path, *, failure: str = "") -> Iterator[None]:
    """Exit the process with a message if the block fails or takes too long.

    Args:
        seconds: Time limit.
        task: Rank and task, for the message.
        messages: File of this rank's messages, to which `{"failure": "error" or "hang",
            "reason": ..., "time": ...}` is added.
        failure: Replaces `error` and `hang`.
    """

    def fail(kind: str, reason: str) -> None:
        reason = reason if len(reason) < MAX_REASON else reason[:MAX_REASON] + " ..."
        message = {"failure": failure or kind, "reason": f"{task}: {reason}", "time": time.time()}
        append_message(messages, message)
        print(f"error: {task}: {reason}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_STATUS)  # threads of the process group may hang too

    def time_out() -> None:
        location = _current_location(sys._current_frames()[threading.main_thread().ident or 0])
        fail("hang", f"timed out after {seconds:g} s in {location}")

    timer = threading.Timer(seconds, time_out)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - the other ranks wait for this one
        traceback.print_exc()
        fail("error", f"{type(error).__name__}: {error}")
    finally:
        timer.cancel()


def _current_location(frame: FrameType) -> str:
    """The innermost frame of the training code, otherwise the innermost frame."""
    frames = traceback.extract_stack(frame)
    training = [
        entry
        for entry in frames
        if "/pretrain/" in entry.filename and "/parity/" not in entry.filename
    ]
    entry = (training or frames)[-1]
    return f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})"
