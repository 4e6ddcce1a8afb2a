"""Corrupts single bytes of files, such as the shards of a dataset."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.shards.manifest import Manifest, load_index
from tests.support.small_shards import make_caption


def shard_path(manifest: Manifest, shard: int) -> Path:
    """The file of a local shard."""
    return Path(manifest.shard_url(manifest.shards[shard]))


def sample_offset(manifest: Manifest, shard: int, sample: int) -> int:
    """Offset of a sample in its shard, bytes."""
    return int(load_index(manifest, manifest.shards[shard]).offsets[sample])


def flip_bit(path: Path, offset: int) -> None:
    """Flip one bit of the byte at `offset`; the size stays the same."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def corrupt_caption(path: Path, index: int) -> None:
    """Change a letter in the caption of sample `index` of `make_samples`: the shard at `path` stays
    readable, and only the checksum of the sample shows the change."""
    flip_bit(path, path.read_bytes().index(make_caption(index).encode()))


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
