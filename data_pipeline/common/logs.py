"""What a person at the console sees: short log lines, and one progress line per long job.

Rank 0 tells the story (INFO); other ranks speak only when something is wrong (WARNING), with their
number in front. Everything goes to standard error, so that results on standard output can be piped.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

TTY_SECONDS = 0.1
"""Least time between two redraws of a progress line on a terminal."""
PLAIN_SECONDS = 5.0
"""Least time between two progress lines in a file or a pipe, where a line cannot be redrawn."""


def setup_logging(rank: int = 0, level: int | str | None = None) -> None:
    """Send this process's log lines to standard error; calling it again replaces the set-up.

    Args:
        rank: Number of this process in the run; rank 0 logs from INFO, others from WARNING.
        level: Overrides that choice, e.g. `"DEBUG"`.
    """
    chosen = level if level is not None else (logging.INFO if rank == 0 else logging.WARNING)
    who = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ShortFormatter(who))
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "_vlm_console", False):
            root.removeHandler(old)
    handler._vlm_console = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(chosen)


def log_to_file(path: Path, rank: int = 0) -> None:
    """Send this process's log lines to a file too, added at its end; for looking back after a run.

    Raises:
        OSError: The file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_ShortFormatter(f"[rank {rank}] ", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)


def note_in_files(message: str) -> None:
    """Write a line only to what `log_to_file` opened, where the console is told in other words."""
    record = logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": message})
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LogFile):
            handler.emit(record)


class _LogFile(logging.FileHandler):
    """A log file whose own trouble, such as a full disk, is not told at every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _ShortFormatter(logging.Formatter):
    """`12:34:56 message` for INFO; other levels are named."""

    def __init__(self, who: str, datefmt: str = "%H:%M:%S") -> None:
        super().__init__(datefmt=datefmt)
        self._who = who

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, self.datefmt)} {self._who}{level}{record.message}"

    def usesTime(self) -> bool:
        return True


class Progress:
    """One console line about a long job: how far, how fast, how much longer.

    On a terminal the line is redrawn in place; elsewhere a new one appears every few seconds, so a
    log file stays readable. Use as a context manager: leaving it prints the last line.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start counting.

        Args:
            label: What is being done, e.g. `"rendering"`.
            total: How many units there are; 0 means unknown.
            unit: What is counted, in the plural, e.g. `"pictures"`.
            done: How many of them were already done before (a resumed job); not part of the rate.
            stream: Where to write; standard error if None.
            clock: Seconds from any start; replaced in tests.
        """
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._start = self._last = clock()
        self._tty = bool(getattr(self._stream, "isatty", lambda: False)())
        self._width = 0

    def update(self, count: int = 1) -> None:
        """Say that `count` more units are done; prints only now and then."""
        self.done += count
        now = self._clock()
        if now - self._last >= (TTY_SECONDS if self._tty else PLAIN_SECONDS):
            self._last = now
            self._write(self.line(now), end="\r" if self._tty else "\n")

    def line(self, now: float | None = None) -> str:
        """The line as it would be printed now."""
        seconds = max((self._clock() if now is None else now) - self._start, 1e-9)
        rate = (self.done - self._first) / seconds
        of = f"/{self.total}" if self.total else ""
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        parts = [
            f"{self.label}: {self.done}{of} {self.unit}{share}",
            f"{rate:,.{0 if rate >= 10 else 1}f}/s",
        ]
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{clock_text((self.total - self.done) / rate)} left")
        else:
            parts.append(clock_text(seconds))
        return ", ".join(parts)

    def close(self) -> None:
        """Print the final line."""
        self._write(self.line(), end="\n")

    def _write(self, text: str, *, end: str) -> None:
        # Blanks cover what a longer line before left on the terminal.
        padded = text.ljust(self._width) if self._tty else text
        self._width = len(text)
        self._stream.write(padded + end)
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def clock_text(seconds: float) -> str:
    """Seconds as a person would say them: `4.2 s`, `3m05s`, `2h07m`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
