"""The training data of a run: its manifests, and a first pass over shards that have none.

Shards without a manifest are read once from end to end before training, each rank its share; the
result is kept in the run folder, so a run that goes on goes on with the same data.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.errors import StorageError
from data_pipeline.common.logs import clock_text
from data_pipeline.common.processes import usable_cpus
from data_pipeline.loading.sources import Source, open_sources
from data_pipeline.shards.indexing import count_shards
from data_pipeline.shards.manifest import MANIFEST_NAME
from pretrain.config.schema import RunConfig
from pretrain.parallel.engine import TrainEngine

logger = logging.getLogger(__name__)

COUNTED_FOLDER = "counted"
_POLL_SECONDS, _TELL_SECONDS = 0.5, 60.0


def open_data(run: RunConfig) -> tuple[Source, ...] | None:
    """The sources of a run, or None where some must be counted first.

    Called before anything costly: a wrong address must not be told after minutes.

    Raises:
        DataError: There are neither a manifest nor shards at an address, or what is there is
        damaged or does
            not belong together.
    """
    if any(_must_be_counted(source.shards, run) for source in run.data.sources):
        return None
    return open_sources(run.data.sources, timeout_seconds=min(60.0, run.data.timeout_seconds))


def count_data(run: RunConfig, out: Path, engine: TrainEngine) -> tuple[Source, ...]:
    """The sources of a run, those without a manifest counted first. Collective.

    Args:
        run: The run.
        out: Its folder, seen by all ranks.
        engine: Talks to the other ranks.

    Raises:
        DataError: Shards cannot be had, or a drop-list does not belong to its source.
    """
    counted: dict[str, str] = {}
    for address in dict.fromkeys(source.shards for source in run.data.sources):
        # Rank 0 looks: ranks must agree on what they do together.
        if engine.broadcast_json(_must_be_counted(address, run) if engine.rank == 0 else None):
            folder = out / COUNTED_FOLDER / hashlib.sha256(address.encode()).hexdigest()[:16]
            _count_together(run, address, folder, engine)
            counted[address] = str(folder)
    return open_sources(
        run.data.sources, timeout_seconds=min(60.0, run.data.timeout_seconds), at=counted
    )


def _must_be_counted(address: str, run: RunConfig) -> bool:
    """Whether an address means shards that have no manifest."""
    plain = address.partition("?")[0] if address.startswith(("http://", "https://")) else address
    if plain.endswith(".json"):
        return False
    if address.startswith("@") or plain.endswith(".tar") or re.search(r"[{*?\[]", plain):
        return True
    seconds = min(60.0, run.data.timeout_seconds)
    if storage.exists(storage.join(address, MANIFEST_NAME), timeout_seconds=seconds):
        return False
    try:
        return any(
            name.endswith(".tar") for name in storage.list_names(address, timeout_seconds=seconds)
        )
    except StorageError:
        return False  # the manifest's own error says more


def _count_together(run: RunConfig, shards: str, folder: Path, engine: TrainEngine) -> None:
    """Every rank counts its share, rank 0 brings them together. Collective."""
    where = str(folder)
    cores = max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if engine.world_size > 1:
        # Files say who is ready, not a collective: those give up after parallel.timeout_seconds,
        # and this may take hours. A rank that fails ends, and its launcher ends the others.
        attempt = engine.broadcast_json(uuid.uuid4().hex)
        count_shards(
            shards,
            where,
            workers=cores,
            part=(engine.rank, engine.world_size),
            timeout_seconds=run.data.timeout_seconds,
        )
        _wait_for_all(folder, attempt, engine.rank, engine.world_size)
    if engine.rank == 0:
        count_shards(shards, where, workers=cores, timeout_seconds=run.data.timeout_seconds)
    engine.barrier()


def _wait_for_all(folder: Path, attempt: str, rank: int, world_size: int) -> None:
    """Say that this rank is ready, and wait until all are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".ready-{attempt}-{rank}").touch()
    started = told = time.monotonic()
    while True:
        missing = world_size - len(list(folder.glob(f".ready-{attempt}-*")))
        if not missing:
            return
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            logger.info(
                "waiting for %d of %d ranks to count their shards (%s so far)",
                missing,
                world_size,
                clock_text(told - started),
            )
        time.sleep(_POLL_SECONDS)
