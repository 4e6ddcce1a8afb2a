"""The `.json` member: nesting depth and limits."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.content.json_fields import MAX_JSON_BYTES, nesting_depth, parse_json_fields


def reference_depth(text: str) -> int:
    """Nesting depth, counted character by character."""
    max_depth = depth = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            in_string, escaped = not (char == '"' and not escaped), char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            max_depth = max(max_depth, depth)
        elif char in "]}":
            depth -= 1
    return max_depth


def test_nesting_depth_equals_reference() -> None:
    rng = np.random.default_rng(0)

    def value(levels: int) -> Any:
        kind = rng.integers(4) if levels else 3
        if kind == 0:
            return [value(levels - 1) for _ in range(rng.integers(4))]
        if kind == 1:
            return {'k"\\[{' + str(i): value(levels - 1) for i in range(rng.integers(4))}
        return "".join(rng.choice(list('a"\\[{]}/n é'), 6))

    depths = set()
    for _ in range(400):
        text = json.dumps({"a": value(6)}, ensure_ascii=bool(rng.integers(2)))
        expected = reference_depth(text)
        assert nesting_depth(text.encode()) == expected
        depths.add(expected)
    assert len(depths) > 4
    assert nesting_depth(b"") == 0 and nesting_depth(b"]]]") == 0


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 4_000_000,
        b'{"a":' * 800_000,
        b'{"a": ' + b"[]," * 10 + b"[" * 100 + b"]" * 100 + b"}",
        b'{"a": ' + b"7" * 4_000_000 + b"}",
        b'{"a": "' + b"x" * 10_000_000 + b'"}',
        b'{"a": "\\ud800',
        b"[1, 2]",
        b"3",
        b"null",
        b'"text"',
        b"",
        b"{",
        b"{}x",
        b"{'a': 1}",
    ],
)
def test_invalid_or_oversized_json_is_rejected_fast(data: bytes) -> None:
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        parse_json_fields(data, 32)
    assert caught.value.slug == "invalid-json"
    assert time.process_time() - start < 1.0
    assert len(str(caught.value)) < 300


def test_json_at_the_limits_is_accepted() -> None:
    assert parse_json_fields(b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}", 32)["a"] is not None
    assert parse_json_fields(b'{"a": "' + b"[{" * 500 + b'\\"[["}', 3) == {"a": "[{" * 500 + '"[['}
    body = b'{"a": "' + b"x" * (MAX_JSON_BYTES - 9) + b'"}'
    assert len(body) == MAX_JSON_BYTES
    assert len(str(parse_json_fields(body, 32)["a"])) == MAX_JSON_BYTES - 9


def test_json_that_is_not_utf8() -> None:
    with pytest.raises(DataError) as caught:
        parse_json_fields(b'{"a": "\xff"}', 32)
    assert caught.value.slug == "invalid-text"


def test_byte_order_mark_is_skipped() -> None:
    assert parse_json_fields(b'\xef\xbb\xbf{"caption": "a"}', 32) == {"caption": "a"}
    with pytest.raises(DataError, match="is not JSON"):
        parse_json_fields(b"\xef\xbb\xbf" * 2 + b"{}", 32)
