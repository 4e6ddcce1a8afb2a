"""Filters and limits, applied to whole samples."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.filters import check_image_size
from data_pipeline.content.sample_processor import SampleProcessor
from data_pipeline.samples import RawSample
from data_pipeline.settings import AugmentConfig, FilterConfig, LimitConfig
from tests.support.images import encode_image, gradient_image

PNG = encode_image(gradient_image(30, 45), "PNG")


def test_image_size_limits() -> None:
    check_image_size(10, 10_000, FilterConfig())
    for width, height in ((199, 800), (800, 199)):
        with pytest.raises(DataError) as caught:
            check_image_size(width, height, FilterConfig(min_side=200))
        assert caught.value.slug == "filter:min-side"
    check_image_size(200, 800, FilterConfig(min_side=200, max_aspect=4.0))
    for width, height in ((200, 801), (801, 200)):
        with pytest.raises(DataError) as caught:
            check_image_size(width, height, FilterConfig(max_aspect=4.0))
        assert caught.value.slug == "filter:max-aspect"


class LengthTokenizer:
    """Encodes the length of a caption."""

    def encode_truncated(self, caption: str, max_length: int) -> tuple[list[int], bool]:
        return [1, len(caption), 2], False


def reason(members: dict[str, bytes], *, limits: LimitConfig | None = None, **filters: Any) -> str:
    """Slug of the error for a sample; empty if it is accepted."""
    sample_processor = SampleProcessor(
        image_size=8,
        context_length=8,
        caption_keys=("txt", "json:also"),
        caption_weights=(1.0, 1.0),
        augment=AugmentConfig(),
        filters=FilterConfig(**filters),
        limits=limits or LimitConfig(),
    )
    tokenizer: Any = LengthTokenizer()
    try:
        sample_processor.process(RawSample("shard", "key", members), 0, tokenizer)
    except DataError as error:
        return error.slug
    return ""


def test_processor_applies_the_filters() -> None:
    good = {"png": PNG, "txt": b"five!", "json": b'{"score": 3, "also": "a longer caption"}'}
    assert reason(good) == ""
    assert reason(good, min_side=31) == "filter:min-side"
    assert reason(good, min_side=30, max_aspect=1.5) == ""
    assert reason(good, max_aspect=1.49) == "filter:max-aspect"
    assert reason(good, require=("json:score >= 3",)) == ""
    assert reason(good, require=("json:score >= 3", "json:score > 3")) == "filter:score"
    assert reason({**good, "json": b"{"}, require=("json:score > 3",)) == "invalid-json"
    assert reason({"png": PNG, "txt": b"x"}, require=("json:score > 3",)) == "filter:score"


def test_caption_of_disallowed_length_is_replaced_by_another() -> None:
    one = {"png": PNG, "txt": b"five!"}
    both = {**one, "json": b'{"also": "a longer caption"}'}
    assert reason(one, min_caption_chars=5, max_caption_chars=5) == ""
    assert reason(one, min_caption_chars=6) == "filter:min-caption-chars"
    assert reason(one, max_caption_chars=4) == "filter:max-caption-chars"
    assert reason(both, min_caption_chars=6) == ""
    assert reason(both, min_caption_chars=60) == "filter:min-caption-chars"
    assert reason({"png": PNG, "txt": b" \n"}, min_caption_chars=6) == "no-caption"


def test_size_filter_precedes_decoding() -> None:
    """An image with corrupt pixels is still filtered by its size, from the header alone."""
    corrupt = PNG[:60] + b"\0\0\0\0" + PNG[64:]
    assert reason({"png": corrupt, "txt": b"x"}) == "corrupt-image"
    jpeg = encode_image(gradient_image(30, 45), "JPEG")
    truncated = jpeg[: len(jpeg) // 2]
    assert reason({"jpg": truncated, "txt": b"x"}) == "corrupt-image"
    assert reason({"jpg": truncated, "txt": b"x"}, min_side=31) == "filter:min-side"


def test_syntax_error_is_raised_when_the_processor_is_created() -> None:
    with pytest.raises(ConfigError, match="expected 'json:'"):
        SampleProcessor(
            image_size=8,
            context_length=8,
            caption_keys=("txt",),
            caption_weights=(1.0,),
            filters=FilterConfig(require=("score > 3",)),
        )


def test_pixel_limit() -> None:
    members = {"png": PNG, "txt": b"x"}
    assert reason(members, limits=LimitConfig(pixels=30 * 45)) == ""
    assert reason(members, limits=LimitConfig(pixels=30 * 45 - 1)) == "corrupt-image"


def test_caption_limit() -> None:
    limits = LimitConfig(caption_chars=10)
    assert reason({"png": PNG, "txt": b"0123456789"}, limits=limits) == ""
    assert reason({"png": PNG, "txt": b"0123456789a"}, limits=limits) == "caption-too-long"
    assert reason({"png": PNG, "txt": b"x" * 10_000_000}) == "caption-too-long"
    long_field = json.dumps({"also": "x" * 200_000}).encode()
    assert reason({"png": PNG, "json": long_field}) == "caption-too-long"


def test_json_depth_limit() -> None:
    limits = LimitConfig(json_depth=3)
    assert reason({"png": PNG, "json": b'{"also": "x", "a": [[1]]}'}, limits=limits) == ""
    deeper = {"png": PNG, "json": b'{"also": "x", "a": [[[1]]]}'}
    assert reason(deeper, limits=limits) == "invalid-json"
