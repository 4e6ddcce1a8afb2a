"""Console output: short log lines, and one progress line per long job.

Control characters in messages are escaped, because they may come from a shard or a file name.

Rank 0 logs from INFO; other ranks log from WARNING, with their rank in front. Everything goes to
standard error, so that results on standard output can be piped.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from data_pipeline.common.escaping import escape_control

TTY_SECONDS = 0.1
"""Minimum time between two redraws of a progress line on a terminal."""
PLAIN_SECONDS = 10.0
"""Minimum time between two progress lines in a file or a pipe, where a line cannot be redrawn."""


def setup_logging(rank: int = 0, level: int | str | None = None) -> None:
    """Log to standard error; another call replaces the previous setup.

    Args:
        rank: Rank of this process; rank 0 logs from INFO, others from WARNING.
        level: Overrides that default, e.g. `"DEBUG"`.
    """
    default_level = logging.INFO if rank == 0 else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ShortFormatter("" if rank == 0 else f"[rank {rank}] "))

    root = logging.getLogger()
    for old in list(root.handlers):
        if hasattr(old, "_vlm_rank"):
            root.removeHandler(old)
    handler._vlm_rank = rank  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(default_level if level is None else level)


def _console_rank() -> int:
    """The rank given to `setup_logging`; 0 without it."""
    return max(
        (getattr(handler, "_vlm_rank", 0) for handler in logging.getLogger().handlers), default=0
    )


def log_to_file(path: Path, rank: int = 0) -> None:
    """Append the log of this process to a file as well.

    Raises:
        OSError: The file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_ShortFormatter(f"[rank {rank}] ", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)


def log_to_files_only(message: str) -> None:
    """Log an error to the files of `log_to_file`, not to the console."""
    record = logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": message})
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LogFile):
            handler.emit(record)


class _LogFile(logging.FileHandler):
    """A log file whose write errors, such as a full disk, are not reported for every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _ShortFormatter(logging.Formatter):
    """`12:34:56 message` for INFO; other levels are named."""

    def __init__(self, prefix: str, datefmt: str = "%H:%M:%S") -> None:
        super().__init__(datefmt=datefmt)
        self._prefix = prefix

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        message = escape_control(record.message, lines=True)
        return f"{self.formatTime(record, self.datefmt)} {self._prefix}{level}{message}"

    def usesTime(self) -> bool:
        return True


class Progress:
    """One console line for a long job: units done, rate and remaining time.

    On a terminal the line is redrawn in place; elsewhere a new line is printed every ten seconds,
    so that a log file stays readable. As a context manager, it prints the final line on exit. Ranks
    other than 0 print nothing.
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
        """Start the clock.

        Args:
            label: Name of the job, e.g. `"rendering"`.
            total: Number of units; 0 means unknown.
            unit: What is counted, in the plural, e.g. `"images"`.
            done: Units completed earlier (a resumed job); they do not count for the rate.
            stream: Where to write; None is standard error.
            clock: Returns seconds; replaced in tests.
        """
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._start = self._last = clock()
        self._tty = bool(getattr(self._stream, "isatty", lambda: False)())
        self._width = 0
        self._is_rank_zero = _console_rank() == 0

    def update(self, count: int = 1) -> None:
        """Count `count` more units; prints only if the last line is old enough."""
        self.done += count
        now = self._clock()
        if now - self._last >= (TTY_SECONDS if self._tty else PLAIN_SECONDS):
            self._last = now
            self._write(self.line(now), end="\r" if self._tty else "\n")

    def line(self, now: float | None = None) -> str:
        """The current progress line."""
        seconds = max((self._clock() if now is None else now) - self._start, 1e-9)
        rate = (self.done - self._first) / seconds

        total = f"/{self.total}" if self.total else ""
        percent = f" ({100 * self.done // self.total}%)" if self.total else ""
        parts = [
            f"{self.label}: {self.done}{total} {self.unit}{percent}",
            f"{rate:,.{0 if rate >= 10 else 1}f}/s",
        ]
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        else:
            parts.append(format_duration(seconds))
        return ", ".join(parts)

    def close(self) -> None:
        """Print the final line."""
        self._write(self.line(), end="\n")

    def _write(self, text: str, *, end: str) -> None:
        if not self._is_rank_zero:
            return
        # Pad to the width of the previous line, to overwrite it completely.
        padded = text.ljust(self._width) if self._tty else text
        self._width = len(text)
        self._stream.write(padded + end)
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def format_duration(seconds: float) -> str:
    """A duration for humans: `4.2 s`, `3m05s`, `2h07m`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"
