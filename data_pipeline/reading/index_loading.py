"""Loads the index of a shard with retries; errors have the slug by which they are counted."""

from __future__ import annotations

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.open_files import is_too_many_open_files
from data_pipeline.reading.shard_failures import failure_reason
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest, ShardEntry, load_index
from data_pipeline.shards.shard_index import ShardIndex

MAX_INDEX_ATTEMPTS = 3
"""Attempts to fetch a remote index that does not match its manifest."""


def load_index_with_retries(
    manifest: Manifest, entry: ShardEntry, settings: DataConfig, timeout_seconds: float
) -> ShardIndex:
    """The index of a shard; a remote one that does not match its manifest is fetched again.

    Raises:
        DataError: It is unavailable (has a slug), or there are too many open files
            (`is_too_many_open_files`).
    """
    for attempt in range(MAX_INDEX_ATTEMPTS):
        try:
            return load_index(
                manifest,
                entry,
                cache_dir=settings.cache_dir,
                timeout_seconds=max(0.1, timeout_seconds),
                request_seconds=settings.request_seconds,
            )
        except StorageError as error:
            if is_too_many_open_files(error):
                raise
            if error.slug or not error.kind:
                raise DataError(str(error), slug=error.slug or "corrupt-index") from error.__cause__

            reason = failure_reason(error)
            slug = "corrupt-index" if reason in ("missing-shard", "truncated") else reason
            raise StorageError(str(error), slug=slug, kind=error.kind) from None
        except DataError as error:
            if storage.is_local(manifest.url) or attempt == MAX_INDEX_ATTEMPTS - 1:
                raise DataError(str(error), slug=error.slug or "corrupt-index") from error
    raise AssertionError("the last attempt returns or raises")
