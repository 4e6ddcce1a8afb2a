"""Shards that could not be had: known to all processes of a node for a while, so that not each
waits for itself.

A store that does not answer costs one process `data.shard_seconds`; the others take its word. After
a while somebody tries again. A refusal is not passed on: another process may have the right
credentials. Nor does a word count for the same shard in another place, which may be healthy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_errors import Kind
from data_pipeline.shards.manifest import Manifest, ShardEntry

logger = logging.getLogger(__name__)

BELIEVED_SECONDS: dict[str, float] = {
    Kind.MISSING: 300.0,
    Kind.REFUSED: 60.0,
    Kind.UNREACHABLE: 30.0,
    Kind.TOO_SLOW: 30.0,
}
"""How long a trouble is believed, by kind; others concern single samples."""
_LONGEST_SECONDS = max(BELIEVED_SECONDS.values())


class Trouble(NamedTuple):
    """Why a shard cannot be had."""

    reason: str
    """`missing-shard`, `bad-index` or `unreachable`."""
    detail: str
    until: float
    """On `time.time()`, which all processes of a node share."""


class Troubles:
    """The troubles of one store, in memory and below a folder that other processes look into."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Know the folder (None: this process alone); it is made with the first trouble."""
        self._folder = Path(folder) if folder is not None else None
        self._known: dict[str, Trouble] = {}
        self._forgotten = 0.0
        """When `forget` was called last; what others noted before is not believed."""

    def of(self, manifest: Manifest, entry: ShardEntry) -> Trouble | None:
        """What is known against a shard now."""
        key = _key(manifest, entry)
        known = self._known.get(key) or self._told(key)
        if known is not None and known.until < time.time():
            self._drop(key)
            return None
        return known

    def add(
        self, manifest: Manifest, entry: ShardEntry, error: StorageError, reason: str = ""
    ) -> Trouble:
        """Remember why a shard could not be had, and the word for it if it is not
        `reason_of(error)`."""
        seconds = BELIEVED_SECONDS.get(error.kind, 0.0)
        trouble = Trouble(reason or reason_of(error), str(error), time.time() + seconds)
        if seconds and self.of(manifest, entry) is None:
            logger.warning(
                "shard %s: %s; its samples count as bad for %.0f s", entry.name, error, seconds
            )
            key = _key(manifest, entry)
            self._known[key] = trouble
            if self._folder is not None and error.kind != Kind.REFUSED:
                with contextlib.suppress(
                    StorageError
                ):  # a full disk; then each finds out for itself
                    storage.write_bytes(str(self._folder / key), json.dumps(trouble).encode())
        return trouble

    def forget(self) -> None:
        """Believe no more that a store does not answer or refuses, neither by this process nor by
        others' word.

        What is missing stays missing: such a store has answered.
        """
        self._forgotten = time.time()
        for key, known in list(self._known.items()):
            if _may_heal(known):
                self._drop(key)

    def _drop(self, key: str) -> None:
        self._known.pop(key, None)
        if self._folder is not None:
            with contextlib.suppress(OSError):  # somebody else's file
                (self._folder / key).unlink()

    def _told(self, key: str) -> Trouble | None:
        """What another process says."""
        if self._folder is None:
            return None
        path = self._folder / key
        try:
            reason, detail, until = json.loads(path.read_bytes())
            # Whatever the file says, or a clock that was set since: not for longer than anything is
            # believed.
            told = Trouble(
                str(reason), str(detail), min(time.time() + _LONGEST_SECONDS, float(until))
            )
            if _may_heal(told) and path.stat().st_mtime < self._forgotten:
                return None
        except (OSError, ValueError, TypeError):
            return None
        self._known[key] = told
        return told


def reason_of(error: StorageError) -> str:
    """By which word the samples are counted that an error of a store concerns."""
    if error.kind == Kind.MISSING:
        return "missing-shard"
    return "truncated" if error.kind == Kind.CHANGED else "unreachable"


def _may_heal(trouble: Trouble) -> bool:
    return trouble.reason == "unreachable"


def _key(manifest: Manifest, entry: ShardEntry) -> str:
    """A file's name for one shard in one place: that of its index counts too, which may be what
    cannot be had."""
    place = (manifest.shard_url(entry), manifest.index_url(entry), entry.sha256)
    return hashlib.sha256("\n".join(place).encode()).hexdigest()
