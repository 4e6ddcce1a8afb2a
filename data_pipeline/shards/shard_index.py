"""Where every sample of a shard lies, which files it has, and its checksum: `NAME.tar.index`.

With it a sample is one read of known length: no tar header is parsed while training, and a sample
that is not what it was is recognized. The file is in safetensors' format, one column a tensor, and
is mapped into memory rather than read, so that all processes of a machine share one copy of it:

    offsets, extents   int64 [samples]   first byte of the sample's first tar header, and bytes from there
                                         to the end of its last file's padding
    crc32              uint32 [samples]  over those bytes, headers and padding included
    key_ends, key_text                   keys as UTF-8 text, all in one piece
    member_ends        int64 [samples]   files of all samples up to and with this one
    member_extension, member_start, member_size   one row a file: which of `extensions`, where its content
                                         begins (from the sample's offset) and its bytes
    metadata           version, shard_bytes, sha256 (of the shard), samples, extensions (a JSON list);
                       where known, etag (of the store), damage (what could not be read) and
                       made_from (a hash of what the shard was written from)

A file of unknown origin cannot do harm: everything in it is checked when it is opened.
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
VERSION = "2"
_NOTES = ("etag", "damage", "made_from")


class Member(NamedTuple):
    """One file of a sample."""

    extension: str
    """In lower case, without the first dot: `jpg`, `seg.png`."""
    start: int
    """First byte of its content, from the sample's offset."""
    size: int
    """Bytes of its content."""


class SampleRow(NamedTuple):
    """One sample as `ShardIndex.build` takes it."""

    key: str
    offset: int
    extent: int
    crc32: int
    members: tuple[Member, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """One row a sample, in the shard's order; read-only. Made by `build`, `from_bytes` or
    `open`."""

    offsets: np.ndarray
    """int64 `[samples]`, bytes from the shard's start; rising."""
    extents: np.ndarray
    """int64 `[samples]`, bytes."""
    crc32: np.ndarray
    """uint32 `[samples]`, of the extent's bytes."""
    shard_bytes: int
    sha256: str
    """Of the whole shard, 64 hexadecimal digits."""
    extensions: tuple[str, ...]
    """Every extension of the shard, in the order in which they came first."""
    etag: str = ""
    """What the store called the shard's contents when it was indexed; empty if unknown."""
    damage: str = ""
    """What of the shard could not be read, in words; empty for a shard that is whole."""
    made_from: str = ""
    """What its writer noted, to know the shard again; see `writer.write_shards`."""
    columns: Columns
    """The tensors of the file by name; for `to_bytes` and tools."""

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, i: int) -> str:
        """Key of sample `i`, as WebDataset has it."""
        i = range(len(self))[i]  # raises where numpy would wrap around or hand out an array
        ends, start = self.columns["key_ends"], 0
        if i:
            start = int(ends[i - 1])
        return (
            self.columns["key_text"][start : int(ends[i])]
            .tobytes()
            .decode("utf-8", "backslashreplace")
        )

    @property
    def keys(self) -> list[str]:
        """All keys in order; for tools, as it decodes each."""
        text, starts = self.columns["key_text"].tobytes(), [0, *self.columns["key_ends"].tolist()]
        return [
            text[start:end].decode("utf-8", "backslashreplace") for start, end in pairwise(starts)
        ]

    def members(self, i: int) -> tuple[Member, ...]:
        """The files of sample `i`, in the shard's order."""
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
        """The sidecar file's contents; equal indices give equal bytes."""
        metadata = {
            "version": VERSION,
            "shard_bytes": str(self.shard_bytes),
            "sha256": self.sha256,
            "samples": str(len(self)),
            "extensions": json.dumps(self.extensions),
        }
        metadata |= {note: text for note in _NOTES if (text := getattr(self, note))}
        return encode(self.columns, metadata)

    @staticmethod
    def build(
        rows: Sequence[SampleRow], *, shard_bytes: int, sha256: str, **notes: str
    ) -> ShardIndex:
        """An index of samples that somebody found in a shard.

        Args:
            rows: The samples, in the shard's order.
            shard_bytes: Length of the shard.
            sha256: Of the whole shard.
            notes: Any of `etag`, `damage` and `made_from`.

        Raises:
            DataError: They overlap, lie beyond the shard's end, or have a file outside of
            themselves.
        """
        extensions = {member.extension: 0 for row in rows for member in row.members}
        numbers = {extension: number for number, extension in enumerate(extensions)}
        keys = [row.key.encode("utf-8", "backslashreplace") for row in rows]
        members = [member for row in rows for member in row.members]
        columns = {
            "offsets": [row.offset for row in rows],
            "extents": [row.extent for row in rows],
            "crc32": [row.crc32 for row in rows],
            "key_ends": np.cumsum([len(key) for key in keys]),
            "key_text": np.frombuffer(b"".join(keys), np.uint8),
            "member_ends": np.cumsum([len(row.members) for row in rows]),
            "member_extension": [numbers[member.extension] for member in members],
            "member_start": [member.start for member in members],
            "member_size": [member.size for member in members],
        }
        arrays = {name: np.asarray(columns[name], dtype) for name, dtype in COLUMNS.items()}
        metadata = {
            "version": VERSION,
            "shard_bytes": str(shard_bytes),
            "sha256": sha256,
            "samples": str(len(rows)),
            "extensions": json.dumps(list(numbers)),
            **notes,
        }
        return _index_of(arrays, metadata)

    @staticmethod
    def from_bytes(data: bytes | memoryview | mmap.mmap, where: str) -> ShardIndex:
        """Read a sidecar file; the columns are views of `data`, which must not change.

        Args:
            data: Its contents.
            where: Its address, for messages.

        Raises:
            DataError: It is not an index, or says what cannot be (slug `bad-index`).
        """
        try:
            return _index_of(*decode(data))
        except (DataError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if bytes(data[:1]) == b"{":
                found = "an index of an older version"
            else:
                found = f"not a shard index of this program ({error})"
            raise DataError(
                f"{where} is {found}; make it again with `vlmoe data index`", slug="bad-index"
            ) from None

    @staticmethod
    def open(path: str | os.PathLike[str], where: str = "", *, sha256: str = "") -> ShardIndex:
        """Map a local sidecar file into memory and check it.

        The file must be replaced, never changed in place, while it is open (`storage.write_bytes`
        does so).

        Args:
            path: The file.
            where: How messages call it, if not by its path.
            sha256: What its contents must hash to; empty does not check.

        Raises:
            DataError: It is not an index, or not the one with that hash (slug `bad-index`).
            StorageError: It cannot be read.
        """
        shown = where or os.fspath(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(
                f"cannot read the shard index {shown}: {reason}; make it with `vlmoe data index`",
                slug="bad-index",
            ) from error
        if sha256:
            check_index_hash(data, sha256, shown)
        return ShardIndex.from_bytes(data, shown)


def check_index_hash(data: bytes | mmap.mmap, sha256: str, where: str) -> None:
    """Compare a sidecar's contents with what its manifest says.

    Raises:
        DataError: They differ (slug `bad-index`).
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(
            f"{where} has SHA-256 {found}, but the manifest expects {sha256}: one of the two was changed; make "
            f"both again with `vlmoe data index`",
            slug="bad-index",
        )


def index_name(shard: str) -> str:
    """Name or address of the index of a shard of that name or address."""
    return f"{shard}{INDEX_SUFFIX}"


def _index_of(columns: Columns, metadata: Mapping[str, str]) -> ShardIndex:
    """The index of these columns, after checking that every number in them can be true."""
    if metadata["version"] != VERSION:
        raise DataError(
            f"it has version {metadata['version']!r}, but this program reads {VERSION!r}"
        )
    extensions, shard_bytes = json.loads(metadata["extensions"]), int(metadata["shard_bytes"])
    if not isinstance(extensions, list) or not all(isinstance(name, str) for name in extensions):
        raise DataError("its extensions are not a list of text")
    if not re.fullmatch("[0-9a-f]{64}", metadata["sha256"]):
        raise DataError(f"the shard's SHA-256 is {metadata['sha256']!r}")
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
        **{note: metadata.get(note, "") for note in _NOTES},
    )
