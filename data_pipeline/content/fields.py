"""The `.json` member of a sample: read once, and within limits.

A few bytes can ask a parser for a great deal: brackets in brackets without end, a number of a
million digits, or a member so long that its objects fill the memory. Length and depth are therefore
looked at before anything is parsed, in one pass that costs less than the parsing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from data_pipeline.common.errors import DataError

MAX_JSON_BYTES = 4 << 20
"""Longest `.json` member; its objects take up to 25 times as much memory."""

_QUOTE = ord('"')
_STEPS = np.zeros(256, np.int8)
"""How each byte changes the depth: an opening bracket by one, a closing one back."""
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def parse_fields(data: bytes, max_depth: int) -> dict[str, object]:
    """The fields of a `.json` member.

    Args:
        data: UTF-8 text of one JSON object.
        max_depth: Most brackets inside each other.

    Raises:
        DataError: It is not that, or goes beyond a limit (slug `bad-json`).
    """
    if len(data) > MAX_JSON_BYTES:
        raise _bad_json(f"has {len(data):,} bytes, more than {MAX_JSON_BYTES:,}")
    # Nearly always there are too few brackets to look where they are.
    if data.count(b"[") + data.count(b"{") > max_depth and depth(data) > max_depth:
        raise _bad_json(
            f"has more than {max_depth} brackets inside each other (data.limits.json_depth)"
        )
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"the .json member is not UTF-8: {error}", slug="bad-text") from error
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise _bad_json(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _bad_json(f"holds a {type(value).__name__}, not an object with fields")
    return value


def depth(data: bytes) -> int:
    """Most brackets inside each other in a JSON text, those in strings not counted."""
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    codes = np.frombuffer(bare, np.uint8)
    # Sums of 8 bits wrap round, but stay odd inside a string.
    in_string = np.cumsum(codes == _QUOTE, dtype=np.uint8) & 1
    steps = np.where(in_string, 0, _STEPS[codes])
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def look_up(fields: dict[str, object], path: Sequence[str]) -> object:
    """The value of a field, or of a field of a field; `MISSING` where there is none."""
    value: object = fields
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


MISSING = object()
"""Stands for a field that a sample does not have; not None, which is JSON's null."""


def _bad_json(what: str) -> DataError:
    return DataError(f"the .json member {what}", slug="bad-json")
