"""`vlmoe data index`: make the manifest of shards that somebody else wrote.

Each shard is read from end to end once, by several processes; its index is written as soon as it is
known, so a run that was ended goes on where it was. The manifest comes last. All that is damaged is
named at the end, before any training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.logs import Progress
from data_pipeline.common.processes import WHOLE, Part, in_processes
from data_pipeline.shards.index_one import Indexed, IndexJob, index_one
from data_pipeline.shards.manifest import (
    MANIFEST_NAME,
    RESERVED,
    Manifest,
    load_manifest,
    write_manifest,
)
from data_pipeline.shards.patterns import expand
from data_pipeline.shards.places import common_folder, is_same_folder, name_under
from data_pipeline.shards.shard_entry import ShardEntry
from data_pipeline.shards.shard_index import index_name

__all__ = ["count_shards", "expand", "index_shards"]

logger = logging.getLogger(__name__)

_SMALL_BYTES = 64 << 20
"""Local shards of this many bytes together are indexed before processes would have started."""
_HOPELESS = 20
"""Stop when so many shards failed and none went well: keys or the address are wrong, not shards."""


def index_shards(
    shards: str | Sequence[str],
    out: str = "",
    *,
    workers: int = 1,
    part: Part = WHOLE,
    salvage: bool = False,
    about: Mapping[str, Any] | None = None,
    timeout_seconds: float = 300.0,
) -> Manifest:
    """Index shards: write an index for each, and a manifest for all.

    Args:
        shards: A folder, shards, braces, wildcards or list files; see `patterns.py`.
        out: The folder of manifest and indices; empty is the folder that holds all the shards. If
            the shards do not lie in it, the manifest names their folder (its `base`); so shards
            that nobody may write beside can be indexed too.
        workers: Processes; 0 and 1 do the work in this one. A script that asks for more needs `if
            __name__ == "__main__":`.
        part: `(i, n)` indexes only every n-th shard from the i-th on, and writes no manifest; when
            all parts are done, a call without brings them together. For job arrays.
        salvage: Keep what can be read of damaged shards; their rows in the manifest say what is
            lost.
        about: More to say in the manifest; None keeps what an older manifest of the folder says
            (sources, licenses).
        timeout_seconds: Longest time for one request to a store, all tries together.

    Returns:
        The manifest; with a `part`, only of its shards, and not written.

    Raises:
        DataError: There are no shards, some are damaged (all are named, the others are done by
        then),
            or they do not lie in one place.
        StorageError: An index cannot be written.
    """
    urls = expand([shards] if isinstance(shards, str) else shards)
    base = common_folder(urls, out)
    folder = (out or base).rstrip("/") or "/"
    if folder.startswith("http"):
        raise DataError(
            f"nothing can be written to {storage.redact(folder)}; give another folder for the manifest "
            f"with --out"
        )
    pairs = [(url, name_under(url, base)) for url in urls][part[0] :: part[1]]
    there = _names_in_store(folder)
    jobs = [
        IndexJob(
            url,
            name,
            storage.join(folder, index_name(name)),
            there is None or index_name(name) in there,
            salvage,
            timeout_seconds,
        )
        for url, name in pairs
    ]
    entries = _index_all(jobs, workers)
    if part != WHOLE:
        return Manifest(url=folder, base=base, shards=tuple(entries))
    kept = _older_about(folder) if about is None else about
    return write_manifest(folder, entries, kept, base="" if is_same_folder(base, folder) else base)


def count_shards(
    shards: str | Sequence[str],
    folder: str,
    *,
    workers: int = 1,
    part: Part = WHOLE,
    timeout_seconds: float = 300.0,
) -> Manifest:
    """A manifest for shards that have none, in a local folder: what a run does that begins without
    one.

    A folder that has the manifest of the same addresses keeps it, also when shards have been added
    or changed since: a run that goes on must go on with the same data. Damaged shards do not end a
    run; what can be read of them is used. With several ranks, each calls this with its `part` and
    waits for the others; then one calls it without, and the others load the manifest of `folder`.

    Args:
        shards: As for `index_shards`.
        folder: Where manifest and indices go, seen by all ranks; one of its own for each data
            source.
        workers: Processes of this rank.
        part: `(rank, world)`: this rank's share of the work.
        timeout_seconds: As for `index_shards`.

    Raises:
        DataError: There are no shards, or they cannot be had.
    """
    asked = (
        [storage.redact(shards)]
        if isinstance(shards, str)
        else [storage.redact(shard) for shard in shards]
    )
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        manifest = load_manifest(folder)
        if manifest.about.get("counted_from") == asked:
            return manifest
    brings_together = part == WHOLE and any(storage.local_path(folder).glob("**/*.index"))
    if part[0] == 0 and not brings_together:
        logger.warning(
            "%s has no manifest: its shards are read once from end to end before training begins. This takes time "
            "at every first start of a run, and damage done before today looks like data. `vlmoe data index` makes "
            "a manifest once, when the shards are known to be whole",
            ", ".join(asked),
        )
    return index_shards(
        shards,
        folder,
        workers=workers,
        part=part,
        salvage=True,
        about={"counted_from": asked},
        timeout_seconds=timeout_seconds,
    )


def _index_all(jobs: Sequence[IndexJob], workers: int) -> list[ShardEntry]:
    """The rows of all shards, in order."""
    all_local = all(storage.is_local(job.url) for job in jobs)
    if all_local and sum(_local_bytes(job.url) for job in jobs) <= _SMALL_BYTES:
        workers = 1
    done: list[Indexed | None] = [None] * len(jobs)
    failed = 0
    with Progress("indexing", len(jobs), "shards") as progress:
        for number, result in in_processes(
            index_one, jobs, workers if workers > 1 else 0, ordered=False
        ):
            done[number] = result
            failed += result.entry is None
            if failed == _HOPELESS and not any(found and found.entry for found in done):
                break
            progress.update()
    _report(jobs, done)
    return [found.entry for found in done if found and found.entry]


def _report(jobs: Sequence[IndexJob], done: Sequence[Indexed | None]) -> None:
    """Say what was reused and what is damaged.

    Raises:
        DataError: Shards have no row.
    """
    if reused := sum(bool(found and found.reused) for found in done):
        logger.info("%d of %d shards had an index that fits; it was kept", reused, len(jobs))
    for job, found in zip(jobs, done, strict=True):
        if found and found.entry and found.entry.damage:
            logger.warning(
                "%s: %d samples saved; lost: %s",
                storage.redact(job.url),
                found.entry.samples,
                found.entry.damage,
            )
    problems = [found.problem for found in done if found and found.problem]
    if not problems:
        return
    if len(jobs) == 1:
        raise DataError(problems[0])
    rest = sum(found is None for found in done)
    raise DataError(
        f"{len(problems)} of {len(jobs)} shards cannot be indexed"
        + (f" ({rest} were not tried)" if rest else "")
        + ":\n  "
        + "\n  ".join(problems)
        + "\nThe others are done and are not read again. Mend these or leave them out; `vlmoe data index --salvage` "
        "keeps what can be read of damaged ones"
    )


def _names_in_store(folder: str) -> set[str] | None:
    """What is in a folder of a store; None where it is not a store, or must not be listed.

    One list spares a question for each index that is not there, which stores answer slowly.
    """
    if storage.is_local(folder):
        return None
    try:
        return set(storage.list_tree(folder))
    except StorageError:
        return None


def _local_bytes(url: str) -> int:
    try:
        return storage.local_path(url).stat().st_size
    except OSError:
        return 0


def _older_about(folder: str) -> dict[str, Any]:
    """What the manifest that is replaced says beside its shards.

    Read by hand: a manifest that no longer fits its shards is a reason to index them again.
    """
    url = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(url):
        return {}
    try:
        older = dict(json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError, RecursionError) as error:
        logger.warning(
            "%s is no manifest (%s); what it said about the data is lost",
            storage.redact(url),
            error,
        )
        return {}
    return {key: value for key, value in older.items() if key not in RESERVED}
