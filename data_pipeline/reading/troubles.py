"""Shards that could not be had: known to all processes of a node for a while, so that not each waits for itself.

A store that does not answer costs one process `data.shard_seconds`; the others take its word. After a while
somebody tries again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_errors import Kind
from data_pipeline.shards.manifest import ShardEntry

logger = logging.getLogger(__name__)

BELIEVED_SECONDS: dict[str, float] = {
    Kind.MISSING: 300.0, Kind.REFUSED: 60.0, Kind.UNREACHABLE: 30.0, Kind.TOO_SLOW: 30.0,
}  # fmt: skip
"""How long a trouble is believed, by kind; others concern single samples."""


class Trouble(NamedTuple):
    """Why a shard cannot be had."""

    reason: str
    """`missing-shard` or `unreachable`."""
    detail: str
    until: float
    """On `time.time()`, which all processes of a node share."""


class Troubles:
    """The troubles of one store, in memory and below a folder that other processes look into."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Know the folder (None: this process alone); it is made with the first trouble."""
        self._folder = Path(folder) if folder is not None else None
        self._known: dict[str, Trouble] = {}

    def of(self, entry: ShardEntry) -> Trouble | None:
        """What is known against a shard now."""
        known = self._known.get(entry.sha256) or self._told(entry)
        if known is not None and known.until < time.time():
            self._known.pop(entry.sha256, None)
            if self._folder is not None:
                (self._folder / entry.sha256).unlink(missing_ok=True)
            return None
        return known

    def add(self, entry: ShardEntry, error: StorageError, reason: str = "") -> Trouble:
        """Remember why a shard could not be had, and the word for it if it is not `reason_of(error)`."""
        seconds = BELIEVED_SECONDS.get(error.kind, 0.0)
        trouble = Trouble(reason or reason_of(error), str(error), time.time() + seconds)
        if seconds and self.of(entry) is None:
            logger.warning("shard %s: %s; its samples count as bad for %.0f s", entry.name, error, seconds)
            self._known[entry.sha256] = trouble
            if self._folder is not None:
                with contextlib.suppress(StorageError):  # a full disk; then each finds out for itself
                    storage.write_bytes(str(self._folder / entry.sha256), json.dumps(trouble).encode())
        return trouble

    def _told(self, entry: ShardEntry) -> Trouble | None:
        """What another process says."""
        if self._folder is None:
            return None
        try:
            reason, detail, until = json.loads((self._folder / entry.sha256).read_bytes())
        except (OSError, ValueError, TypeError):
            return None
        self._known[entry.sha256] = Trouble(str(reason), str(detail), float(until))
        return self._known[entry.sha256]


def reason_of(error: StorageError) -> str:
    """By which word the samples are counted that an error of a store concerns."""
    if error.kind == Kind.MISSING:
        return "missing-shard"
    return "truncated" if error.kind == Kind.CHANGED else "unreachable"
