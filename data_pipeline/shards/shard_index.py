"""Where every sample of a shard lies, and its checksum: a JSON file beside the shard.

With it a sample is one read of known length, a shard needs no scan before training, and a damaged
sample is recognised. Columns rather than rows: `keys`, `offsets` (byte of the sample's first tar
header), `extents` (bytes up to the end of its last member's padding), `members` (extension and size
of each file), `crc32` (over the extent).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.tar import TarMember, split_name, walk

INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """One row a sample, in the shard's order."""

    keys: tuple[str, ...]
    offsets: np.ndarray
    """int64 `[samples]`, bytes from the shard's start."""
    extents: np.ndarray
    """int64 `[samples]`, bytes."""
    crc32: np.ndarray
    """int64 `[samples]`, of the extent's bytes."""
    members: tuple[tuple[tuple[str, int], ...], ...] = ()
    """Extension and bytes of each sample's files; empty where only reading matters."""

    def to_json(self) -> bytes:
        """The sidecar file's contents; equal indices give equal bytes."""
        columns = {
            "version": 1,
            "keys": list(self.keys),
            "offsets": self.offsets.tolist(),
            "extents": self.extents.tolist(),
            "members": self.members,
            "crc32": self.crc32.tolist(),
        }
        return json.dumps(columns, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes, where: str, *, with_members: bool = True) -> ShardIndex:
        """Read a sidecar file.

        Args:
            data: Its contents.
            where: Its address, for messages.
            with_members: Keep the member lists; readers do not need them, and they are large.

        Raises:
            DataError: It is not an index.
        """
        try:
            columns = json.loads(data)
            index = ShardIndex(
                keys=tuple(columns["keys"]),
                offsets=np.array(columns["offsets"], dtype=np.int64),
                extents=np.array(columns["extents"], dtype=np.int64),
                crc32=np.array(columns["crc32"], dtype=np.int64),
                members=tuple(tuple((name, size) for name, size in row) for row in columns["members"])
                if with_members
                else (),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{where} is not a shard index ({type(error).__name__}: {error}); make it again with "
                f"`vlmoe data index`"
            ) from None
        lengths = {len(index.keys), *(column.shape for column in (index.offsets, index.extents, index.crc32))}
        if lengths != {len(index.keys), (len(index.keys),)}:
            raise DataError(f"{where}: its columns differ in length; make it again with `vlmoe data index`")
        return index


def index_shard(path: str | os.PathLike[str]) -> ShardIndex:
    """Walk a local shard from end to end and note where its samples lie.

    Raises:
        DataError: The archive is damaged or cut off, two samples share a key (or one sample's files
            are not next to each other), or it holds no samples.
        StorageError: The file cannot be read.
    """
    where = str(path)
    keys: list[str] = []
    rows: list[tuple[int, int, int]] = []
    members: list[tuple[tuple[str, int], ...]] = []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"cannot read {where}: {error.strerror}; check the path") from error
    try:
        for key, files in _samples(fd, where):
            offset, extent = files[0].start, files[-1].end - files[0].start
            keys.append(key)
            rows.append((offset, extent, zlib.crc32(os.pread(fd, extent, offset))))
            members.append(tuple((split_name(file.name)[1], file.size) for file in files))
    finally:
        os.close(fd)
    _check_keys(keys, members, where)
    table = np.array(rows, dtype=np.int64)
    return ShardIndex(
        keys=tuple(keys),
        offsets=table[:, 0].copy(),
        extents=table[:, 1].copy(),
        crc32=table[:, 2].copy(),
        members=tuple(members),
    )


def sidecar_path(shard: str | os.PathLike[str]) -> Path:
    """Where the index of a local shard lies."""
    return Path(f"{os.fspath(shard)}{INDEX_SUFFIX}")


def _samples(fd: int, where: str) -> Iterator[tuple[str, list[TarMember]]]:
    """Neighbouring members with the same key; members without an extension belong to none."""
    total_bytes = os.fstat(fd).st_size
    found = walk(lambda offset, count: os.pread(fd, count, offset), total_bytes, where)
    with_keys = ((split_name(member.name)[0], member) for member in found)
    for key, group in groupby((pair for pair in with_keys if pair[0]), key=itemgetter(0)):
        yield key, [member for _, member in group]


def _check_keys(keys: list[str], members: list[tuple[tuple[str, int], ...]], where: str) -> None:
    if not keys:
        raise DataError(
            f"{where} holds no samples: a sample is a group of files with one name and different "
            f"extensions, e.g. 000.jpg and 000.txt"
        )
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DataError(
            f"{where}: the key {twice!r} comes twice: either two samples share it, or the files of one "
            f"sample are not next to each other; write the shard with its files sorted by name"
        )
    for key, files in zip(keys, members, strict=True):
        if len({extension for extension, _ in files}) < len(files):
            raise DataError(f"{where}: sample {key!r} has two files with the same extension; write it again")
