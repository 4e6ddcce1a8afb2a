"""Conditions on JSON fields: parsing and matching."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.filters import check_fields, parse_conditions

FIELDS: dict[str, Any] = {
    "similarity": 0.31,
    "width": 640,
    "NSFW": "UNLIKELY",
    "ok": True,
    "off": False,
    "nothing": None,
    "clip": {"aesthetic": 5.5, "model": {"name": "b"}},
    "two words": "x",
    "tags": ["a"],
    "zero": 0,
    "day": "2023-04-01",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("json:similarity >= 0.31", True),
        ("json:similarity > 0.31", False),
        ("json:similarity>0.3", True),
        ("json:similarity <= 0.31", True),
        ("json:similarity < 0.31", False),
        ("json:width == 640", True),
        ("json:width == 640.0", True),
        ("json:width != 640", False),
        ("json:width != 641", True),
        ("  json:width\t==  640  ", True),
        ("json:width > -1e3", True),
        ('json:NSFW == "UNLIKELY"', True),
        ('json:NSFW != "UNLIKELY"', False),
        ('json:NSFW == "unlikely"', False),
        ('json:NSFW in ["UNSURE", "UNLIKELY"]', True),
        ("json:width in [1, 2]", False),
        ("json:width in [640]", True),
        ('json:day >= "2023-01-01"', True),
        ('json:day < "2023-01-01"', False),
        ("json:clip.aesthetic > 5", True),
        ('json:clip.model.name == "b"', True),
        ("json:clip.missing > 5", False),
        ('json:"two words" == "x"', True),
        ('json:clip."aesthetic" > 5', True),
        ("json:width.x == 1", False),
        ("json:similarity exists", True),
        ("json:missing exists", False),
        ("json:nothing exists", False),
        ("json:off exists", True),
        ("json:ok == true", True),
        ("json:ok == 1", False),
        ("json:zero == false", False),
        ("json:ok in [1]", False),
        ("json:nothing == null", True),
        ("json:nothing != null", False),
        ("json:width != null", True),
        ("json:nothing in [null]", True),
        ("json:nothing != 3", False),
        # Values of different types are unordered and unequal.
        ('json:similarity >= "0.1"', False),
        ("json:NSFW > 0", False),
        ("json:tags > 0", False),
        ('json:width == "640"', False),
        ('json:width != "640"', True),
        ('json:tags == "a"', False),
        # A missing field never matches.
        ("json:missing == 1", False),
        ("json:missing != 1", False),
        ("json:missing in [1]", False),
        ("json:missing == null", False),
    ],
)
def test_condition_matches(text: str, expected: bool) -> None:
    (condition,) = parse_conditions([text])
    assert condition.matches(FIELDS) is expected


def test_operators_compare_like_python() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, right = (int(value) / 2 for value in rng.integers(-3, 4, 2))
        for op in ("==", "!=", "<", "<=", ">", ">="):
            (condition,) = parse_conditions([f"json:a {op} {json.dumps(right)}"])
            expected = {
                "==": left == right,
                "!=": left != right,
                "<": left < right,
                "<=": left <= right,
                ">": left > right,
                ">=": left >= right,
            }[op]
            assert condition.matches({"a": left}) is expected


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 1, "expected 'json:'"),
        ("similarity > 0.3", 1, "expected 'json:'"),
        ("json: > 3", 6, "the name of a field"),
        ("json:a. > 3", 8, "the name of a field"),
        ("json:a", 7, "expected one of =="),
        ("json:a = 3", 8, "expected one of =="),
        ("json:a like 3", 8, "expected one of =="),
        ("json:a inside [3]", 8, "expected one of =="),
        ("json:a >", 9, "a JSON value"),
        ("json:a > abc", 10, "a JSON value"),
        ("json:a == 'x'", 11, "a JSON value"),
        ('json:a == "x', 11, "a JSON value"),
        ("json:a > NaN", 10, "a JSON value"),
        ("json:a > Infinity", 10, "a JSON value"),
        ("json:a > true", 10, "a number or a string after >"),
        ("json:a <= null", 11, "a number or a string after <="),
        ("json:a == [1]", 11, "expected a string in double quotes"),
        ("json:a in 3", 11, "a list of values after in"),
        ("json:a in []", 11, "a list of values after in"),
        ("json:a in [[1]]", 11, "list entries"),
        ("json:a > 1 and json:b > 2", 12, "expected the end"),
        ("json:a exists 3", 15, "expected the end"),
        ("json:a > __import__('os').system('true')", 10, "a JSON value"),
        ("json:a > " + "[" * 5000, 10, "a JSON value"),
        ("json:a > 1" + "0" * 5000, 10, "a JSON value"),
    ],
)
def test_syntax_error_gives_its_position(text: str, position: int, message: str) -> None:
    with pytest.raises(ConfigError, match="require") as caught:
        parse_conditions(["json:fine > 1", text])
    assert f"character {position} " in str(caught.value) and message in str(caught.value)


def test_mismatch_is_reported_under_its_field() -> None:
    conditions = parse_conditions(["json:similarity >= 0.28", "json:clip.aesthetic > 6"])
    check_fields(FIELDS, conditions[:1])

    with pytest.raises(DataError, match=r"json:clip\.aesthetic .*5\.5.* > 6") as caught:
        check_fields(FIELDS, conditions)
    assert caught.value.slug == "filter:clip.aesthetic"

    with pytest.raises(DataError, match="json:similarity is missing") as caught:
        check_fields({}, conditions)
    assert caught.value.slug == "filter:similarity"
