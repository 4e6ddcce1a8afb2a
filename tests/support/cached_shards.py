"""Caches of shards behind a web server, for tests of the shard cache."""

from __future__ import annotations

from data_pipeline.reading.cache import CopyResult, ShardCache
from tests.support.http_shards import WebShards


def make_cache(shards: WebShards, capacity: float) -> ShardCache:
    """A cache with space for `capacity` shards."""
    return ShardCache(shards.cache, capacity * max_shard_bytes(shards) / 2**30)


def max_shard_bytes(shards: WebShards) -> int:
    """Size of the largest shard."""
    return max(entry.bytes for entry in shards.manifest.shards)


def fetch_shard(shards: WebShards, cache: ShardCache, shard: int, **options: object) -> CopyResult:
    """Copy a shard into a cache."""
    entry = shards.manifest.shards[shard]
    defaults: dict[str, object] = {"timeout_seconds": 5.0, "request_seconds": 1.0}
    url = shards.manifest.shard_url(entry)
    return cache.fetch(entry, url, **defaults | options)  # type: ignore[arg-type]


def cached_shards(shards: WebShards, cache: ShardCache) -> list[int]:
    """Indices of the shards that are in a cache."""
    return [index for index, entry in enumerate(shards.manifest.shards) if cache.has(entry)]
