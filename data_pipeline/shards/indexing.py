"""Creates the manifest of existing shards: `vlmoe data index`.

Several processes read each shard once from start to end. Every index is written as soon as its
shard was read, so an interrupted run continues where it stopped; the manifest is written last. All
corrupt shards are listed at the end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.logs import Progress
from data_pipeline.common.processes import SINGLE_PART, Part, map_in_processes
from data_pipeline.shards.index_job import IndexJob, IndexResult, run_index_job
from data_pipeline.shards.index_report import report, report_other_files
from data_pipeline.shards.manifest import (
    INPUTS_FIELD,
    MANIFEST_NAME,
    RESERVED_KEYS,
    SKIPPED_FIELD,
    Manifest,
    write_manifest,
)
from data_pipeline.shards.patterns import expand_patterns, find_shards
from data_pipeline.shards.shard_entry import ShardEntry
from data_pipeline.shards.shard_index import index_name
from data_pipeline.shards.shard_paths import common_folder, is_same_folder, relative_name

__all__ = ["expand_patterns", "index_shards"]

logger = logging.getLogger(__name__)

_SMALL_BYTES = 64 << 20
"""Local shards of at most this total size are indexed without starting processes."""
_MAX_FAILURES = 20
"""Stop after this many failures without a success: the address or credentials are wrong."""


def index_shards(
    shards: str | Sequence[str],
    out: str = "",
    *,
    workers: int = 1,
    part: Part = SINGLE_PART,
    salvage: bool = False,
    metadata: Mapping[str, Any] | None = None,
    timeout_seconds: float = 300.0,
) -> Manifest:
    """Write an index for each shard, and a manifest for all.

    Args:
        shards: A folder, shards, braces, wildcards or list files; see `patterns.py`.
        out: Folder for the manifest and the indices; empty is the folder that contains all shards.
            If it is another folder, the manifest stores the folder of the shards (its `base`), so
            read-only shards can be indexed too.
        workers: Number of processes; with 0 and 1 this process does the work. A script that uses
            more needs `if __name__ == "__main__":`.
        part: `(i, n)` indexes only every n-th shard from the i-th on and writes no manifest; after
            all parts, a call without `part` writes it. For job arrays.
        salvage: Keep what can be read of corrupt shards; their rows in the manifest describe what
            is lost.
        metadata: Further keys of the manifest; None keeps those of an existing one (sources,
            licenses), and of other shards not the numbers of inputs that became these samples.
        timeout_seconds: Limit for one operation on a store, all attempts together.

    Returns:
        The manifest; with `part`, it has only the shards of that part and is not written.

    Raises:
        DataError: There are no shards, some are corrupt (all are listed, and the others were
            indexed), or they have no common folder.
        StorageError: An index cannot be written.
    """
    urls, ignored = find_shards([shards] if isinstance(shards, str) else shards)
    base = common_folder(urls, out)
    folder = (out or base).rstrip("/") or "/"
    _check_writable(folder)
    names = {url: relative_name(url, base) for url in urls}
    existing = _list_store(folder)
    jobs = [
        IndexJob(
            url=url,
            name=names[url],
            index_url=storage.join(folder, index_name(names[url])),
            may_have_index=existing is None or index_name(names[url]) in existing,
            salvage=salvage,
            timeout_seconds=timeout_seconds,
        )
        for url in urls[part[0] :: part[1]]
    ]
    entries = _run_jobs(jobs, workers)
    report_other_files(len(urls), ignored)

    if part != SINGLE_PART:
        return Manifest(url=folder, base=base, shards=tuple(entries))
    if metadata is None:
        metadata = _existing_metadata(folder, entries)
    stored_base = "" if is_same_folder(base, folder) else base
    return write_manifest(folder, entries, metadata, base=stored_base)


def _check_writable(folder: str) -> None:
    if folder.startswith("http"):
        raise DataError(
            f"cannot write to {storage.redact(folder)}; give another folder for the manifest with "
            f"--out"
        )


def _run_jobs(jobs: Sequence[IndexJob], workers: int) -> list[ShardEntry]:
    """The manifest rows of all shards, in order."""
    all_local = all(storage.is_local(job.url) for job in jobs)
    if all_local and sum(_local_bytes(job.url) for job in jobs) <= _SMALL_BYTES:
        workers = 1

    results: list[IndexResult | None] = [None] * len(jobs)
    failures = successes = 0
    with Progress("indexing", len(jobs), "shards") as progress:
        for i, result in map_in_processes(
            run_index_job, jobs, workers if workers > 1 else 0, ordered=False
        ):
            results[i] = result
            if result.entry:
                successes += 1
            else:
                failures += 1
            if failures == _MAX_FAILURES and not successes:
                break
            progress.update()
    report(jobs, results)
    return [result.entry for result in results if result and result.entry]


def _list_store(folder: str) -> set[str] | None:
    """The names in a folder of a store; None if it is local or cannot be listed.

    One listing replaces a slow request per shard to check whether its index exists.
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


def _existing_metadata(folder: str, entries: Sequence[ShardEntry]) -> dict[str, Any]:
    """The metadata of the manifest that will be replaced, as far as it is true of `entries`.

    Not read with `load_manifest`: shards are often indexed again because it is no longer valid.
    """
    url = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(url):
        return {}
    try:
        content = dict(json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError, RecursionError) as error:
        logger.warning(
            "%s is not a manifest (%s); its metadata is lost", storage.redact(url), error
        )
        return {}
    rows = content.get("shards")
    known = [row.get("sha256") for row in rows if isinstance(row, dict)] if rows else []
    is_same = known == [entry.sha256 for entry in entries]
    omitted = RESERVED_KEYS if is_same else (*RESERVED_KEYS, INPUTS_FIELD, SKIPPED_FIELD)
    return {key: value for key, value in content.items() if key not in omitted}
