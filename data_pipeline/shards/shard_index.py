"""The index of a shard: offset, files and checksum of every sample, in `NAME.tar.index`.

With it, a sample is one read of known length: no tar headers are parsed during training, and
corrupt samples are detected. The file is in safetensors format, one tensor per column, and is
memory-mapped, so that all processes of a machine share one copy:

    offsets, extents   int64 [samples]   first byte of the sample's first tar header, and bytes from
                                         there to the end of the padding of its last file
    crc32              uint32 [samples]  over those bytes, headers and padding included
    key_ends, key_text                   keys as UTF-8, concatenated
    member_ends        int64 [samples]   number of files of all samples up to and including this one
    member_extension, member_start, member_size   one row per file: index into `extensions`, offset
                                         of its contents (from the sample's offset), and bytes
    metadata           version, shard_bytes, sha256 (of the shard), samples, extensions (a JSON
                       list); if known, etag (of the store), corruption (what could not be read),
                       source_hash (of the samples that the shard was written from) and ignored
                       (members that belong to no sample: a JSON object of numbers by rule)

Everything in the file is checked when it is opened, so an untrusted file is safe to open.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.index_file import COLUMNS, Columns, check_columns, decode, encode

INDEX_SUFFIX = ".index"
VERSION = "3"
_OPTIONAL_METADATA = ("etag", "corruption", "source_hash")


class Member(NamedTuple):
    """One file of a sample."""

    extension: str
    """In lower case, without the first dot: `jpg`, `seg.png`."""
    start: int
    """First byte of its contents, relative to the sample's offset."""
    size: int
    """Bytes of its contents."""


class SampleRow(NamedTuple):
    """One sample, as passed to `ShardIndex.build`."""

    key: str
    offset: int
    extent: int
    crc32: int
    members: tuple[Member, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """One row per sample, in the order of the shard; read-only.

    Created by `build`, `from_bytes` or `open`.
    """

    offsets: np.ndarray
    """int64 `[samples]`, bytes from the start of the shard; increasing."""
    extents: np.ndarray
    """int64 `[samples]`, bytes."""
    crc32: np.ndarray
    """uint32 `[samples]`, over the bytes of the extent."""
    shard_bytes: int
    sha256: str
    """Of the whole shard, 64 hexadecimal digits."""
    extensions: tuple[str, ...]
    """All extensions in the shard, in order of first occurrence."""
    etag: str = ""
    """ETag of the shard in the store when it was indexed; empty if unknown."""
    corruption: str = ""
    """Description of what could not be read; empty for an intact shard."""
    source_hash: str = ""
    """Hash of the samples that the shard was written from; see `writer.write_shards`."""
    ignored: Mapping[str, int]
    """Number of members that belong to no sample, by rule: `hidden file`, `folder` ..."""
    columns: Columns
    """The columns of the file by name; for `to_bytes` and tools."""

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, i: int) -> str:
        """Key of sample `i`, as in WebDataset."""
        i = range(len(self))[i]  # allows negative indices; raises IndexError
        ends = self.columns["key_ends"]
        start = int(ends[i - 1]) if i else 0
        text = self.columns["key_text"][start : int(ends[i])].tobytes()
        return text.decode("utf-8", "backslashreplace")

    @property
    def keys(self) -> list[str]:
        """All keys in order; slow, because it decodes each of them."""
        text, starts = self.columns["key_text"].tobytes(), [0, *self.columns["key_ends"].tolist()]
        return [
            text[start:end].decode("utf-8", "backslashreplace") for start, end in pairwise(starts)
        ]

    def members(self, i: int) -> tuple[Member, ...]:
        """The files of sample `i`, in the order of the shard."""
        i = range(len(self))[i]
        ends = self.columns["member_ends"]
        rows = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        return tuple(
            Member(self.extensions[extension], start, size)
            for extension, start, size in zip(
                self.columns["member_extension"][rows].tolist(),
                self.columns["member_start"][rows].tolist(),
                self.columns["member_size"][rows].tolist(),
                strict=True,
            )
        )

    def to_bytes(self) -> bytes:
        """The contents of the index file; equal indices give equal bytes."""
        metadata = {
            "version": VERSION,
            "shard_bytes": str(self.shard_bytes),
            "sha256": self.sha256,
            "samples": str(len(self)),
            "extensions": json.dumps(self.extensions),
        }
        metadata |= {name: text for name in _OPTIONAL_METADATA if (text := getattr(self, name))}
        metadata |= {"ignored": json.dumps(self.ignored, sort_keys=True)} if self.ignored else {}
        return encode(self.columns, metadata)

    @staticmethod
    def build(
        rows: Sequence[SampleRow],
        *,
        shard_bytes: int,
        sha256: str,
        ignored: Mapping[str, int] | None = None,
        **optional_metadata: str,
    ) -> ShardIndex:
        """Create the index of a shard.

        Args:
            rows: The samples, in the order of the shard.
            shard_bytes: Size of the shard.
            sha256: SHA-256 of the whole shard.
            ignored: Number of members that belong to no sample, by rule.
            optional_metadata: Any of `etag`, `corruption` and `source_hash`.

        Raises:
            DataError: Samples overlap or are beyond the end of the shard, or a file is outside of
                its sample.
        """
        extensions = dict.fromkeys(member.extension for row in rows for member in row.members)
        extension_ids = {extension: i for i, extension in enumerate(extensions)}
        keys = [row.key.encode("utf-8", "backslashreplace") for row in rows]
        members = [member for row in rows for member in row.members]
        columns = {
            "offsets": [row.offset for row in rows],
            "extents": [row.extent for row in rows],
            "crc32": [row.crc32 for row in rows],
            "key_ends": np.cumsum([len(key) for key in keys]),
            "key_text": np.frombuffer(b"".join(keys), np.uint8),
            "member_ends": np.cumsum([len(row.members) for row in rows]),
            "member_extension": [extension_ids[member.extension] for member in members],
            "member_start": [member.start for member in members],
            "member_size": [member.size for member in members],
        }
        arrays = {name: np.asarray(columns[name], dtype) for name, dtype in COLUMNS.items()}
        metadata = {
            "version": VERSION,
            "shard_bytes": str(shard_bytes),
            "sha256": sha256,
            "samples": str(len(rows)),
            "extensions": json.dumps(list(extension_ids)),
            "ignored": json.dumps(dict(ignored or {}), sort_keys=True),
            **optional_metadata,
        }
        return _index_of(arrays, metadata)

    @staticmethod
    def from_bytes(data: bytes | memoryview | mmap.mmap, where: str) -> ShardIndex:
        """Decode an index file; the columns are views of `data`, which must not change.

        Args:
            data: The contents of the file.
            where: Its address, for messages.

        Raises:
            DataError: It is not an index, or is inconsistent (slug `corrupt-index`).
        """
        try:
            return _index_of(*decode(data))
        except (DataError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if bytes(data[:1]) == b"{":
                problem = "an index of an older version"
            else:
                problem = f"not a valid shard index ({error})"
            raise DataError(
                f"{where} is {problem}; create it again with `vlmoe data index`",
                slug="corrupt-index",
            ) from None

    @staticmethod
    def open(path: str | os.PathLike[str], where: str = "", *, sha256: str = "") -> ShardIndex:
        """Memory-map a local index file and check it.

        While it is open, the file may be replaced but not changed in place (`storage.write_bytes`
        replaces it).

        Args:
            path: The file.
            where: Its name in messages; empty is its path.
            sha256: Expected hash of its contents; empty does not check.

        Raises:
            DataError: It is not an index, or not the one with that hash (slug `corrupt-index`).
            StorageError: It cannot be read.
        """
        where = where or os.fspath(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(
                f"cannot read the shard index {where}: {reason}; create it with `vlmoe data index`",
                slug="corrupt-index",
            ) from error
        if sha256:
            check_index_hash(data, sha256, where)
        return ShardIndex.from_bytes(data, where)


def check_index_hash(data: bytes | mmap.mmap, sha256: str, where: str) -> None:
    """Compare the contents of an index file with the hash in its manifest.

    Raises:
        DataError: They differ (slug `corrupt-index`).
    """
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise DataError(
            f"{where} has SHA-256 {actual}, but the manifest expects {sha256}: one of the two was "
            f"changed; create both again with `vlmoe data index`",
            slug="corrupt-index",
        )


def index_name(shard: str) -> str:
    """Name or address of a shard's index, from the name or address of the shard."""
    return f"{shard}{INDEX_SUFFIX}"


def _index_of(columns: Columns, metadata: Mapping[str, str]) -> ShardIndex:
    """The index with these columns, after checking them."""
    if metadata["version"] != VERSION:
        raise DataError(
            f"it has version {metadata['version']!r}, but version {VERSION!r} is required"
        )
    extensions, shard_bytes = json.loads(metadata["extensions"]), int(metadata["shard_bytes"])
    if not isinstance(extensions, list) or not all(isinstance(name, str) for name in extensions):
        raise DataError("its extensions are not a list of strings")
    if not re.fullmatch("[0-9a-f]{64}", metadata["sha256"]):
        raise DataError(f"the shard's SHA-256 is {metadata['sha256']!r}")
    ignored = json.loads(metadata.get("ignored", "{}"))
    if not isinstance(ignored, dict) or not all(type(n) is int and n > 0 for n in ignored.values()):
        raise DataError("its numbers of ignored members are not a mapping to positive integers")
    samples = int(metadata["samples"])
    check_columns(columns, samples=samples, shard_bytes=shard_bytes, num_extensions=len(extensions))
    for column in columns.values():
        column.flags.writeable = False
    return ShardIndex(
        offsets=columns["offsets"],
        extents=columns["extents"],
        crc32=columns["crc32"],
        columns=columns,
        shard_bytes=shard_bytes,
        sha256=metadata["sha256"],
        extensions=tuple(extensions),
        ignored=ignored,
        **{name: metadata.get(name, "") for name in _OPTIONAL_METADATA},
    )
