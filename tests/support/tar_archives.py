"""Tar archives in memory: writing, indexing and reading them."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

from data_pipeline.shards.scan import scan
from data_pipeline.shards.shard_index import ShardIndex


def archive(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of files, given as contents by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def set_checksum(header: bytearray) -> bytearray:
    """Store the checksum of a tar header, the sum of its bytes."""
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return header


def scan_bytes(data: bytes, *, chunk: int = 4096, salvage: bool = False) -> ShardIndex:
    """The index of a shard, from a stream of chunks of `chunk` bytes."""
    chunks = (data[start : start + chunk] for start in range(0, len(data), chunk))
    return scan(chunks, len(data), "x.tar", salvage=salvage)


def read_by_index(index: ShardIndex, data: bytes) -> list[dict[str, bytes] | None]:
    """Members of each sample by extension; None if its size or CRC-32 differs from the index."""
    samples: list[dict[str, bytes] | None] = []
    for i in range(len(index)):
        offset, extent = int(index.offsets[i]), int(index.extents[i])
        sample = data[offset : offset + extent]
        if len(sample) != extent or zlib.crc32(sample) != index.crc32[i]:
            samples.append(None)
            continue
        samples.append({m.extension: sample[m.start : m.start + m.size] for m in index.members(i)})
    return samples


def tar_of(path: Path, names: list[str]) -> Path:
    """Write an archive of empty files."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return path
