"""The file of a shard index: numbers in columns, text about them, in safetensors' format.

Written and read here by hand: the same columns always give the same bytes (the library orders its
metadata by chance), nothing is copied when a file is opened, and every number is checked. A file of
unknown origin can be refused, but cannot do harm.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.common.errors import DataError

_KINDS = {"I64": "<i8", "U32": "<u4", "U8": "|u1"}
COLUMNS: dict[str, np.dtype[Any]] = {
    name: np.dtype(_KINDS[kind])
    for kind, names in {
        "I64": ("extents", "key_ends", "member_ends", "member_size", "member_start", "offsets"),
        "U32": ("crc32", "member_extension"),
        "U8": ("key_text",),
    }.items()
    for name in names
}
"""Names and types, widest first: so every column begins at a multiple of its item size."""
_MAX_HEADER_BYTES = 4 << 20
_MAX_SHARD_BYTES = 1 << 60
"""Sums of two places in a shard must not leave int64."""

Columns = Mapping[str, np.ndarray]


def encode(columns: Columns, metadata: Mapping[str, str]) -> bytes:
    """A file's contents; equal columns and metadata give equal bytes."""
    kinds = {np.dtype(text): kind for kind, text in _KINDS.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, pieces = 0, []
    for name, dtype in COLUMNS.items():
        piece = columns[name].astype(dtype, copy=False).tobytes()
        header[name] = {
            "dtype": kinds[dtype],
            "shape": [len(columns[name])],
            "data_offsets": [position, position + len(piece)],
        }
        position += len(piece)
        pieces.append(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(pieces)


def decode(data: bytes | memoryview | mmap.mmap) -> tuple[Columns, dict[str, str]]:
    """Columns, as views of `data`, and metadata.

    Raises:
        DataError, ValueError, TypeError, KeyError, RecursionError: It is not such a file.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise DataError(f"{len(data)} bytes, with a header of {header_bytes}")
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    metadata = header.pop("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise DataError("its header is not a mapping with metadata")
    if set(header) != set(COLUMNS):
        raise DataError(f"it has the columns {sorted(header)}, but should have {sorted(COLUMNS)}")
    body, position = 8 + header_bytes, 0
    columns = {}
    for name in sorted(header, key=lambda name: tuple(header[name]["data_offsets"])):
        kind, (count,), (start, end) = (
            header[name][part] for part in ("dtype", "shape", "data_offsets")
        )
        dtype = COLUMNS[name]
        if _KINDS[kind] != dtype.str or not all(
            type(number) is int for number in (count, start, end)
        ):
            raise DataError(f"the column {name} is {kind} {count!r} at {start!r}..{end!r}")
        # One column after the other, without gaps: nothing overlaps and nothing hides in between.
        if (
            count < 0
            or (start, end) != (position, position + count * dtype.itemsize)
            or end > len(data) - body
        ):
            raise DataError(f"the column {name} lies at {start}..{end} of {len(data) - body} bytes")
        columns[name] = np.frombuffer(data, dtype, count, body + start)
        position = end
    if position != len(data) - body:
        raise DataError(f"{len(data) - body - position} bytes follow the last column")
    return columns, metadata


def check_columns(columns: Columns, *, samples: int, shard_bytes: int, num_extensions: int) -> None:
    """Samples must follow each other within the shard, and files lie within their samples.

    Raises:
        DataError: They do not.
    """
    if not 0 <= shard_bytes <= _MAX_SHARD_BYTES:
        raise DataError(f"the shard has {shard_bytes} bytes")
    for name in ("offsets", "extents", "crc32", "key_ends", "member_ends"):
        if len(columns[name]) != samples:
            raise DataError(
                f"the column {name} has {len(columns[name])} rows for {samples} samples"
            )
    offsets, extents = columns["offsets"], columns["extents"]
    # Each number first, then sums and differences of them: checked so, none can wrap around.
    in_shard = (offsets >= 0) & (offsets <= shard_bytes) & (extents > 0) & (extents <= shard_bytes)
    if not in_shard.all() or (offsets + extents > np.append(offsets[1:], shard_bytes)).any():
        raise DataError(f"its samples overlap, or lie outside of the shard's {shard_bytes} bytes")
    rows = {"key_ends": len(columns["key_text"]), "member_ends": len(columns["member_size"])}
    for name, total in rows.items():
        ends = columns[name]
        in_range = ((ends >= 0) & (ends <= total)).all() and (
            int(ends[-1]) if len(ends) else 0
        ) == total
        if not in_range or (np.diff(ends, prepend=0) < 0).any():
            raise DataError(f"the column {name} does not divide {total} rows")
    if {len(columns[name]) for name in ("member_extension", "member_start")} != {
        len(columns["member_size"])
    }:
        raise DataError("the columns about members differ in length")
    starts, sizes = columns["member_start"], columns["member_size"]
    room = np.repeat(extents, np.diff(columns["member_ends"], prepend=0))
    inside = (starts >= 0) & (starts <= room) & (sizes >= 0) & (sizes <= room)
    if not inside.all() or (starts + sizes > room).any():
        raise DataError("a file lies outside of its sample")
    if (columns["member_extension"] >= num_extensions).any():
        raise DataError("a file has an extension that is not listed")
