"""All captions of shards, one after the other: what a tokenizer learns from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from data_pipeline.common.errors import DataError
from data_pipeline.common.logs import Progress
from data_pipeline.content.captions import find
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.shards.manifest import Manifest

logger = logging.getLogger(__name__)

_NAMED_PROBLEMS = 10
"""Damaged samples that are named one by one; the rest are counted."""


def captions_of(manifests: Sequence[Manifest], keys: Sequence[str], *, cache_dir: str = "") -> Iterator[str]:
    """Every caption of every sample, clean, in the order of the shards.

    Damaged samples are left out, named and counted in the log.

    Args:
        manifests: The shards.
        keys: Where captions are: `txt`, or `json:FIELD`.
        cache_dir: Where copies of remote shards go.

    Raises:
        DataError: A shard is missing or is not the one of its manifest.
        ConfigError: A manifest is remote and there is no `cache_dir`, or a key is no caption key.
    """
    store = ShardStore(manifests, cache_dir=cache_dir)
    reader = Reader(store)
    problems = 0
    sizes = [entry.samples for manifest in manifests for entry in manifest.shards]
    try:
        with Progress("reading captions", sum(sizes), "samples") as progress:
            for shard, samples in enumerate(sizes):
                for index in range(samples):
                    progress.update()
                    try:
                        members = reader.read(shard, index).members
                        found = [caption for key in keys for caption in find(members, key)]
                    except DataError as error:
                        if not error.slug:  # the shard, not a sample of it
                            raise
                        problems += 1
                        if problems <= _NAMED_PROBLEMS:
                            name, sample = reader.name(shard, index)
                            logger.warning("left out %s of %s: %s: %s", sample, name, error.slug, error)
                        continue
                    yield from found
    finally:
        store.close()
    if problems:
        logger.warning("%d of %d samples were damaged and left out", problems, sum(sizes))
