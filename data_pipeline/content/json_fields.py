"""Parsing of a sample's `.json` member within limits.

A small file can make a JSON parser use a lot of memory or time: deeply nested brackets, a number
with a million digits, or a very long member whose objects fill the memory. Size and nesting depth
are therefore checked before parsing, in one pass that costs less than parsing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from data_pipeline.common.errors import DataError

MAX_JSON_BYTES = 4 << 20
"""Maximum size of a `.json` member; the parsed objects take up to 25 times as much memory."""

MISSING = object()
"""Returned for a field that does not exist; None stands for JSON's null."""

_QUOTE = ord('"')
_DEPTH_CHANGES = np.zeros(256, np.int8)
"""Change of the nesting depth, by byte value: +1 for `[` and `{`, -1 for `]` and `}`."""
_DEPTH_CHANGES[list(b"[{")], _DEPTH_CHANGES[list(b"]}")] = 1, -1


def parse_json_fields(data: bytes, max_depth: int) -> dict[str, object]:
    """Parse a `.json` member.

    Args:
        data: UTF-8 text of one JSON object, possibly after a byte-order mark.
        max_depth: Maximum nesting depth.

    Raises:
        DataError: The member is not a JSON object or exceeds a limit (slug `invalid-json`), or is
            not UTF-8 (slug `invalid-text`).
    """
    if len(data) > MAX_JSON_BYTES:
        raise _invalid_json(f"has {len(data):,} bytes, more than {MAX_JSON_BYTES:,}")

    # The number of opening brackets is an upper bound of the depth, fast to compute, and nearly
    # always small enough.
    max_possible_depth = data.count(b"[") + data.count(b"{")
    if max_possible_depth > max_depth and nesting_depth(data) > max_depth:
        raise _invalid_json(f"is nested deeper than {max_depth} levels (data.limits.json_depth)")

    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"the .json member is not UTF-8: {error}", slug="invalid-text") from error
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of > 4300 digits
        raise _invalid_json(f"is not JSON: {error}") from error

    if not isinstance(value, dict):
        raise _invalid_json(f"contains a {type(value).__name__}, expected an object")
    return value


def nesting_depth(data: bytes) -> int:
    """Maximum nesting depth of a JSON text; brackets inside strings are not counted."""
    # Without escaped quotes, every remaining quote starts or ends a string.
    without_escapes = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    values = np.frombuffer(without_escapes, np.uint8)
    # The 8-bit sum wraps around, but its parity (odd inside a string) stays correct.
    in_string = np.cumsum(values == _QUOTE, dtype=np.uint8) & 1
    changes = np.where(in_string, 0, _DEPTH_CHANGES[values])
    return int(np.cumsum(changes, dtype=np.int32).max(initial=0))


def get_field(fields: dict[str, object], path: Sequence[str]) -> object:
    """Value of the field at `path`, the names of nested fields; `MISSING` if it does not exist."""
    value: object = fields
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def _invalid_json(problem: str) -> DataError:
    return DataError(f"the .json member {problem}", slug="invalid-json")
