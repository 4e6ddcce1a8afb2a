"""Opens the training data of a run, and indexes shards that have no manifest.

Such shards are read once before training, split over the ranks. The manifests are stored in the run
folder, so that a resumed run uses the same data.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from pathlib import Path

from data_pipeline.common.logs import format_duration
from data_pipeline.common.processes import usable_cpus
from data_pipeline.loading.sources import Source, open_sources
from data_pipeline.order.state import LoaderState
from data_pipeline.shards.run_indexing import (
    index_for_run,
    needs_indexing,
    run_manifest_folder,
)
from pretrain.config.schema import RunConfig
from pretrain.parallel.communicator import Communicator

logger = logging.getLogger(__name__)

_POLL_SECONDS, _LOG_SECONDS = 0.5, 60.0


def open_sources_if_indexed(run: RunConfig) -> tuple[Source, ...] | None:
    """The sources of a run, or None if some of them have no manifest yet.

    Called before anything slow, so that a wrong address is reported at once.

    Raises:
        DataError: There are neither a manifest nor shards at an address, or the files there are
            corrupt or do not belong together.
    """
    if any(_needs_indexing(source.shards, run) for source in run.data.sources):
        return None
    return open_sources(run.data.sources, timeout_seconds=min(60.0, run.data.timeout_seconds))


def index_data(
    run: RunConfig, out: Path, communicator: Communicator, saved: LoaderState
) -> tuple[Source, ...]:
    """Index the sources that have no manifest, and open all sources of a run. Collective.

    Args:
        run: The run.
        out: The run folder, shared by all ranks; locked by this run.
        communicator: Provides the collectives.
        saved: State of the last checkpoint, or a new one.

    Raises:
        DataError: Shards cannot be read, or a drop-list does not belong to its source.
    """
    if communicator.rank == 0 and run.data.phase > saved.phase:
        # A start of this phase that did not reach a checkpoint may have seen other shards.
        for source in run.data.sources:
            folder = run_manifest_folder(out, source.shards, run.data.phase)
            shutil.rmtree(folder, ignore_errors=True)
    communicator.barrier()
    indexed: dict[str, str] = {}
    for address in dict.fromkeys(source.shards for source in run.data.sources):
        indexed[address] = index_address(run, address, out, communicator, phase=run.data.phase)
    return open_sources(
        run.data.sources, timeout_seconds=min(60.0, run.data.timeout_seconds), manifest_urls=indexed
    )


def index_address(
    run: RunConfig, address: str, out: Path, communicator: Communicator, *, phase: int = 1
) -> str:
    """Where the manifest of an address is; shards without one are indexed by all ranks. Collective.

    Args:
        run: The run.
        address: Of training data or an evaluation set.
        out: The run folder, shared by all ranks.
        communicator: Provides the collectives.
        phase: Phase of training data; every phase indexes an address again.

    Raises:
        DataError: Shards cannot be read.
    """
    # Rank 0 decides, since indexing is collective and storage may change in between.
    if not communicator.broadcast_json(
        _needs_indexing(address, run) if communicator.rank == 0 else None
    ):
        return address
    folder = run_manifest_folder(out, address, phase)
    _index_on_all_ranks(run, address, Path(folder), communicator)
    return folder


def _needs_indexing(address: str, run: RunConfig) -> bool:
    return needs_indexing(address, timeout_seconds=min(60.0, run.data.timeout_seconds))


def _index_on_all_ranks(
    run: RunConfig, shards: str, folder: Path, communicator: Communicator
) -> None:
    """Every rank indexes a part of the shards, then rank 0 writes the manifest. Collective."""
    workers = max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if communicator.world_size > 1:
        # Ranks synchronize by files, because indexing may take hours and a collective would time
        # out after parallel.timeout_seconds. If a rank fails, torchrun stops the others.
        attempt = communicator.broadcast_json(uuid.uuid4().hex)
        index_for_run(
            shards,
            str(folder),
            workers=workers,
            part=(communicator.rank, communicator.world_size),
            timeout_seconds=run.data.timeout_seconds,
        )
        _wait_for_all(folder, attempt, communicator.rank, communicator.world_size)
    if communicator.rank == 0:
        index_for_run(
            shards, str(folder), workers=workers, timeout_seconds=run.data.timeout_seconds
        )
    communicator.barrier()


def _wait_for_all(folder: Path, attempt: str, rank: int, world_size: int) -> None:
    """Create this rank's ready-file and wait for those of all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".ready-{attempt}-{rank}").touch()
    started = logged = time.monotonic()
    while True:
        num_missing = world_size - len(list(folder.glob(f".ready-{attempt}-*")))
        if not num_missing:
            return
        if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            logger.info(
                "waiting for %d of %d ranks to index their shards (%s so far)",
                num_missing,
                world_size,
                format_duration(logged - started),
            )
        time.sleep(_POLL_SECONDS)
