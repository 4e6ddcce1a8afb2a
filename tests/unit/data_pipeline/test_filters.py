from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.fields import MAX_JSON_BYTES, depth, parse_fields
from data_pipeline.content.filters import check_fields, check_size, compile_conditions
from data_pipeline.content.recipe import Recipe
from data_pipeline.samples import RawSample
from data_pipeline.settings import AugmentConfig, FilterConfig, LimitConfig
from tests.support.pictures import encoded, smooth

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
        # A field of another kind has no order, and is not equal.
        ('json:similarity >= "0.1"', False),
        ("json:NSFW > 0", False),
        ("json:tags > 0", False),
        ('json:width == "640"', False),
        ('json:width != "640"', True),
        ('json:tags == "a"', False),
        # Without the field, nothing holds.
        ("json:missing == 1", False),
        ("json:missing != 1", False),
        ("json:missing in [1]", False),
        ("json:missing == null", False),
    ],
)
def test_a_condition_holds_or_not(text: str, expected: bool) -> None:
    (condition,) = compile_conditions([text])
    assert condition.holds(FIELDS) is expected


def test_signs_mean_what_python_means() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, right = (int(value) / 2 for value in rng.integers(-3, 4, 2))
        for sign in ("==", "!=", "<", "<=", ">", ">="):
            (condition,) = compile_conditions([f"json:a {sign} {json.dumps(right)}"])
            expected = {
                "==": left == right,
                "!=": left != right,
                "<": left < right,
                "<=": left <= right,
                ">": left > right,
                ">=": left >= right,
            }[sign]
            assert condition.holds({"a": left}) is expected


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", 1, "expected 'json:'"),
        ("similarity > 0.3", 1, "expected 'json:'"),
        ("json: > 3", 6, "the name of a field"),
        ("json:a. > 3", 8, "the name of a field"),
        ("json:a", 7, "expected one of =="),
        ("json:a = 3", 8, "expected one of =="),
        ("json:a like 3", 8, "expected one of =="),
        ("json:a inside [3]", 8, "expected one of =="),
        ("json:a >", 9, "a value as JSON"),
        ("json:a > abc", 10, "a value as JSON"),
        ("json:a == 'x'", 11, "a value as JSON"),
        ('json:a == "x', 11, "a value as JSON"),
        ("json:a > NaN", 10, "a value as JSON"),
        ("json:a > Infinity", 10, "a value as JSON"),
        ("json:a > true", 10, "a number or text after >"),
        ("json:a <= null", 11, "a number or text after <="),
        ("json:a == [1]", 11, "expected text in double quotes"),
        ("json:a in 3", 11, "a list of values after in"),
        ("json:a in []", 11, "a list of values after in"),
        ("json:a in [[1]]", 11, "the values of a list"),
        ("json:a > 1 and json:b > 2", 12, "should end here"),
        ("json:a exists 3", 15, "should end here"),
        ("json:a > __import__('os').system('true')", 10, "a value as JSON"),
        ("json:a > " + "[" * 5000, 10, "a value as JSON"),
        ("json:a > 1" + "0" * 5000, 10, "a value as JSON"),
    ],
)
def test_a_bad_condition_is_refused_with_its_place(text: str, place: int, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_conditions(["json:fine > 1", text])
    assert f"character {place} " in str(caught.value) and what in str(caught.value)


def test_a_sample_that_does_not_hold_is_counted_under_the_field() -> None:
    conditions = compile_conditions(["json:similarity >= 0.28", "json:clip.aesthetic > 6"])
    with pytest.raises(
        DataError, match=r"json:clip.aesthetic is 5.5, but .*asks for > 6"
    ) as caught:
        check_fields(FIELDS, conditions)
    assert caught.value.slug == "filter:clip.aesthetic"
    check_fields(FIELDS, conditions[:1])
    with pytest.raises(DataError, match="json:similarity is not there") as caught:
        check_fields({}, conditions)
    assert caught.value.slug == "filter:similarity"


def test_sizes() -> None:
    check_size(10, 10_000, FilterConfig())
    for width, height in ((199, 800), (800, 199)):
        with pytest.raises(DataError) as caught:
            check_size(width, height, FilterConfig(min_side=200))
        assert caught.value.slug == "filter:min-side"
    check_size(200, 800, FilterConfig(min_side=200, max_aspect=4.0))
    for width, height in ((200, 801), (801, 200)):
        with pytest.raises(DataError) as caught:
            check_size(width, height, FilterConfig(max_aspect=4.0))
        assert caught.value.slug == "filter:max-aspect"


class NoTokens:
    def encode_clean(self, caption: str, max_length: int) -> list[int]:
        return [1, len(caption), 2]


def reason(members: dict[str, bytes], *, limits: LimitConfig | None = None, **filters: Any) -> str:
    """Why a sample is left out; empty if it is not."""
    recipe = Recipe(
        image_size=8,
        context_length=8,
        caption_keys=("txt", "json:also"),
        caption_weights=(1.0, 1.0),
        augment=AugmentConfig(),
        filters=FilterConfig(**filters),
        limits=limits or LimitConfig(),
    )
    try:
        recipe.make(RawSample("shard", "key", members), 0, NoTokens())  # type: ignore[arg-type]
    except DataError as error:
        return error.slug
    return ""


PICTURE = encoded(smooth(30, 45), "PNG")


def test_a_recipe_leaves_out_what_its_filters_say() -> None:
    good = {"png": PICTURE, "txt": b"five!", "json": b'{"score": 3, "also": "a longer caption"}'}
    assert reason(good) == ""
    assert reason(good, min_side=31) == "filter:min-side"
    assert reason(good, min_side=30, max_aspect=1.5) == ""
    assert reason(good, max_aspect=1.49) == "filter:max-aspect"
    assert reason(good, require=("json:score >= 3",)) == ""
    assert reason(good, require=("json:score >= 3", "json:score > 3")) == "filter:score"
    assert reason({**good, "json": b"{"}, require=("json:score > 3",)) == "bad-json"
    assert reason({"png": PICTURE, "txt": b"x"}, require=("json:score > 3",)) == "filter:score"


def test_captions_that_do_not_fit_are_passed_over_while_another_one_does() -> None:
    one = {"png": PICTURE, "txt": b"five!"}
    both = {**one, "json": b'{"also": "a longer caption"}'}
    assert reason(one, min_caption_chars=5, max_caption_chars=5) == ""
    assert reason(one, min_caption_chars=6) == "filter:min-caption-chars"
    assert reason(one, max_caption_chars=4) == "filter:max-caption-chars"
    assert reason(both, min_caption_chars=6) == ""
    assert reason(both, min_caption_chars=60) == "filter:min-caption-chars"
    assert reason({"png": PICTURE, "txt": b" \n"}, min_caption_chars=6) == "no-caption"


def test_left_out_by_the_header_alone() -> None:
    """A picture whose pixels are damaged is still left out for its size: it is not decoded
    first."""
    damaged = PICTURE[:60] + b"\0\0\0\0" + PICTURE[64:]
    assert reason({"png": damaged, "txt": b"x"}) == "bad-image"
    jpeg = encoded(smooth(30, 45), "JPEG")
    cut = jpeg[: len(jpeg) // 2]
    assert reason({"jpg": cut, "txt": b"x"}) == "bad-image"
    assert reason({"jpg": cut, "txt": b"x"}, min_side=31) == "filter:min-side"


def test_a_bad_condition_is_found_when_the_recipe_is_made() -> None:
    with pytest.raises(ConfigError, match="expected 'json:'"):
        Recipe(
            image_size=8,
            context_length=8,
            caption_keys=("txt",),
            caption_weights=(1.0,),
            filters=FilterConfig(require=("score > 3",)),
        )


def test_limits_of_a_sample() -> None:
    few = LimitConfig(pixels=30 * 45 - 1, caption_chars=10, json_depth=3)
    assert reason({"png": PICTURE, "txt": b"x"}, limits=LimitConfig(pixels=30 * 45)) == ""
    assert reason({"png": PICTURE, "txt": b"x"}, limits=few) == "bad-image"
    assert (
        reason({"png": PICTURE, "txt": b"0123456789"}, limits=LimitConfig(caption_chars=10)) == ""
    )
    assert reason({"png": PICTURE, "txt": b"0123456789a"}, limits=few) == "caption-too-long"
    assert reason({"png": PICTURE, "txt": b"x" * 10_000_000}) == "caption-too-long"
    assert (
        reason({"png": PICTURE, "json": json.dumps({"also": "x" * 200_000}).encode()})
        == "caption-too-long"
    )
    assert (
        reason(
            {"png": PICTURE, "json": b'{"also": "x", "a": [[1]]}'}, limits=LimitConfig(json_depth=3)
        )
        == ""
    )
    assert (
        reason({"png": PICTURE, "json": b'{"also": "x", "a": [[[1]]]}'}, limits=few) == "bad-json"
    )


def slow_depth(text: str) -> int:
    """Character by character."""
    deepest = now = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            in_string, escaped = not (char == '"' and not escaped), char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "[{":
            now += 1
            deepest = max(deepest, now)
        elif char in "]}":
            now -= 1
    return deepest


def test_depth_is_counted_as_character_by_character() -> None:
    rng = np.random.default_rng(0)

    def value(room: int) -> Any:
        kind = rng.integers(4) if room else 3
        if kind == 0:
            return [value(room - 1) for _ in range(rng.integers(4))]
        if kind == 1:
            return {'k"\\[{' + str(i): value(room - 1) for i in range(rng.integers(4))}
        return "".join(rng.choice(list('a"\\[{]}/n é'), 6))

    depths = set()
    for _ in range(400):
        text = json.dumps({"a": value(6)}, ensure_ascii=bool(rng.integers(2)))
        depths.add(slow_depth(text))
        assert depth(text.encode()) == slow_depth(text)
    assert len(depths) > 4
    assert depth(b"") == 0 and depth(b"]]]") == 0


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
        b"\xef\xbb\xbf{}",
    ],
)
def test_json_that_asks_for_too_much_costs_little(data: bytes) -> None:
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        parse_fields(data, 32)
    assert caught.value.slug == "bad-json"
    assert time.process_time() - start < 1.0
    assert len(str(caught.value)) < 300


def test_json_at_the_limits_is_read() -> None:
    assert parse_fields(b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}", 32)["a"] is not None
    assert parse_fields(b'{"a": "' + b"[{" * 500 + b'\\"[["}', 3) == {"a": "[{" * 500 + '"[['}
    body = b'{"a": "' + b"x" * (MAX_JSON_BYTES - 9) + b'"}'
    assert (
        len(body) == MAX_JSON_BYTES and len(str(parse_fields(body, 32)["a"])) == MAX_JSON_BYTES - 9
    )
    with pytest.raises(DataError) as caught:
        parse_fields(b'{"a": "\xff"}', 32)
    assert caught.value.slug == "bad-text"
