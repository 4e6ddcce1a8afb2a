"""`events.jsonl` of a run folder: what happened to a run, such as skipped steps; rank 0 writes it.

Unlike metrics, events of steps that are repeated after a restart stay in the file.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends events; an I/O error is logged and does not stop the run."""

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        self._path, self._enabled = run_dir / EVENTS_FILE, enabled
        self._has_started = False

    def start(self, step: int, **fields: object) -> None:
        """Append the event of this start, once: a run may go back to a checkpoint later."""
        if not self._has_started:
            self.write("start", step, **fields)
        self._has_started = True

    def write(self, event: str, step: int, **fields: object) -> None:
        """Append one event.

        Args:
            event: What happened: `start`, `skipped-step`, `rewind`, `stop`.
            step: Completed steps.
            fields: JSON values that describe it.
        """
        if not self._enabled:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": now, "event": event, "step": step} | fields)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.error("cannot write %s: %s", self._path, error.strerror or error)
