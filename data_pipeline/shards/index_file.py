"""The file format of a shard index: columns and metadata in safetensors format.

Encoding and decoding are implemented here: equal columns give equal bytes (the safetensors library
writes metadata in arbitrary order), opening copies nothing, and every number is checked, so that an
untrusted file is rejected or safe to use.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.common.errors import DataError

_KINDS = {"I64": "<i8", "U32": "<u4", "U8": "|u1"}
"""Name of a dtype in safetensors -> in numpy."""
COLUMNS: dict[str, np.dtype[Any]] = {
    name: np.dtype(_KINDS[kind])
    for kind, names in {
        "I64": ("extents", "key_ends", "member_ends", "member_size", "member_start", "offsets"),
        "U32": ("crc32", "member_extension"),
        "U8": ("key_text",),
    }.items()
    for name in names
}
"""Names and dtypes, widest first, so that every column is aligned to its item size."""
_MAX_HEADER_BYTES = 4 << 20
_MAX_SHARD_BYTES = 1 << 60
"""Sums of two offsets in a shard must fit into int64."""

Columns = Mapping[str, np.ndarray]


def encode(columns: Columns, metadata: Mapping[str, str]) -> bytes:
    """The contents of the file; equal columns and metadata give equal bytes."""
    kinds = {np.dtype(text): kind for kind, text in _KINDS.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, blobs = 0, []
    for name, dtype in COLUMNS.items():
        blob = columns[name].astype(dtype, copy=False).tobytes()
        header[name] = {
            "dtype": kinds[dtype],
            "shape": [len(columns[name])],
            "data_offsets": [position, position + len(blob)],
        }
        position += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def decode(data: bytes | memoryview | mmap.mmap) -> tuple[Columns, dict[str, str]]:
    """Columns, as views of `data`, and metadata.

    Raises:
        DataError, ValueError, TypeError, KeyError, RecursionError: It is not such a file.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise DataError(f"it has {len(data)} bytes, with a header of {header_bytes} bytes")
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    metadata = header.pop("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise DataError("its header is not a mapping with metadata")
    if set(header) != set(COLUMNS):
        raise DataError(f"it has the columns {sorted(header)}, but should have {sorted(COLUMNS)}")
    return _decode_columns(data, header, 8 + header_bytes), metadata


def _decode_columns(
    data: bytes | memoryview | mmap.mmap, header: dict[str, Any], body: int
) -> Columns:
    """The columns, which must follow each other from offset `body` to the end of the file."""
    body_bytes, position = len(data) - body, 0
    columns = {}
    for name in sorted(header, key=lambda name: tuple(header[name]["data_offsets"])):
        kind, (count,), (start, end) = (
            header[name][field] for field in ("dtype", "shape", "data_offsets")
        )
        dtype = COLUMNS[name]
        are_integers = all(type(number) is int for number in (count, start, end))
        if _KINDS[kind] != dtype.str or not are_integers:
            raise DataError(f"the column {name} is {kind} {count!r} at {start!r}..{end!r}")
        # Contiguous columns cannot overlap, and no unchecked bytes are between them.
        is_contiguous = (start, end) == (position, position + count * dtype.itemsize)
        if count < 0 or not is_contiguous or end > body_bytes:
            raise DataError(f"the column {name} is at {start}..{end} of {body_bytes} bytes")
        columns[name] = np.frombuffer(data, dtype, count, body + start)
        position = end
    if position != body_bytes:
        raise DataError(f"{body_bytes - position} bytes follow the last column")
    return columns


def check_columns(columns: Columns, *, samples: int, shard_bytes: int, num_extensions: int) -> None:
    """Check that samples are ordered and within the shard, and files within their samples.

    Raises:
        DataError: They are not.
    """
    if not 0 <= shard_bytes <= _MAX_SHARD_BYTES:
        raise DataError(f"the shard has {shard_bytes} bytes")
    for name in ("offsets", "extents", "crc32", "key_ends", "member_ends"):
        if len(columns[name]) != samples:
            raise DataError(
                f"the column {name} has {len(columns[name])} rows for {samples} samples"
            )

    offsets, extents = columns["offsets"], columns["extents"]
    # Single numbers are checked before their sums and differences, so that none can overflow.
    in_shard = (offsets >= 0) & (offsets <= shard_bytes) & (extents > 0) & (extents <= shard_bytes)
    if not in_shard.all() or (offsets + extents > np.append(offsets[1:], shard_bytes)).any():
        raise DataError(f"its samples overlap, or are outside of the shard's {shard_bytes} bytes")

    rows = {"key_ends": len(columns["key_text"]), "member_ends": len(columns["member_size"])}
    for name, total in rows.items():
        ends = columns[name]
        last = int(ends[-1]) if len(ends) else 0
        in_range = ((ends >= 0) & (ends <= total)).all() and last == total
        if not in_range or (np.diff(ends, prepend=0) < 0).any():
            raise DataError(f"the column {name} does not divide {total} rows")
    _check_members(columns, extents, num_extensions)


def _check_members(columns: Columns, extents: np.ndarray, num_extensions: int) -> None:
    starts, sizes = columns["member_start"], columns["member_size"]
    if not len(columns["member_extension"]) == len(starts) == len(sizes):
        raise DataError("the columns of members differ in length")

    limit = np.repeat(extents, np.diff(columns["member_ends"], prepend=0))
    inside = (starts >= 0) & (starts <= limit) & (sizes >= 0) & (sizes <= limit)
    if not inside.all() or (starts + sizes > limit).any():
        raise DataError("a file is outside of its sample")
    if (columns["member_extension"] >= num_extensions).any():
        raise DataError("a file has an extension that is not listed")
