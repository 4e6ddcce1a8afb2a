"""Which file of a sample is its image, and samples without a unique one."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.preparing.check import check
from data_pipeline.sample_keys import (
    IMAGE_KEYS,
    SampleKeys,
    check_image_keys,
    image_bytes,
    image_problem,
)
from data_pipeline.samples import RawSample
from data_pipeline.shards.indexing import index_shards
from tests.support.properties import check_property, num_examples
from tests.support.small_shards import make_png
from tests.support.tar_archives import archive


@pytest.mark.parametrize(
    ("extensions", "keys", "expected"),
    [
        (("jpg", "txt"), IMAGE_KEYS, ""),
        (("depth.png", "jpg", "txt"), IMAGE_KEYS, ""),
        (("jpg", "depth.png", "mask.npy", "json", "txt"), IMAGE_KEYS, ""),
        (("left.jpg", "right.jpg", "txt"), ("left.jpg",), ""),
        (("left.jpg", "left.txt", "txt"), ("left.jpg",), ""),
        (("left.jpg", "right.jpg", "txt"), IMAGE_KEYS, "no-image"),
        (("txt", "json"), IMAGE_KEYS, "no-image"),
        ((), IMAGE_KEYS, "no-image"),
        (("jpg", "png", "txt"), IMAGE_KEYS, "several-images"),
        (("jpg", "png", "txt"), ("png",), ""),
        (("jpg", "txt", "2.jpg", "2.txt"), IMAGE_KEYS, "several-samples"),
        (("2.jpg", "2.txt", "jpg", "txt"), IMAGE_KEYS, "several-samples"),
        (("01.jpg", "01.txt", "02.jpg", "02.txt"), IMAGE_KEYS, "several-samples"),
        (("01.jpg", "01.txt"), IMAGE_KEYS, "no-image"),
    ],
)
def test_image_problem(extensions: tuple[str, ...], keys: tuple[str, ...], expected: str) -> None:
    problem = image_problem(extensions, keys)
    assert (problem[0] if problem else "") == expected
    raw = RawSample("s.tar", "k", {extension: extension.encode() for extension in extensions})
    if expected:
        with pytest.raises(DataError) as error:
            image_bytes(raw, keys)
        assert error.value.slug == expected
    else:
        assert image_bytes(raw, keys).decode() in keys


@pytest.mark.parametrize("keys", [(), ("JPG",), (".jpg",), ("",), ("a/b",), ("jpg", "a b")])
def test_invalid_image_keys(keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="image keys"):
        check_image_keys(keys)


_ENDS = st.sampled_from(["jpg", "png", "webp", "txt", "caption", "json", "npy"])
_EXTENSIONS = st.sampled_from(["", "", "", "2.", "v1.", "left.", "a.b."]).flatmap(
    lambda prefix: _ENDS.map(lambda end: prefix + end)
)
_KEYS = st.just(IMAGE_KEYS) | st.lists(_EXTENSIONS, min_size=1, max_size=3).map(tuple)


@num_examples
def test_a_sample_has_one_image_or_one_reason(examples: int) -> None:
    def check(extensions: list[str], keys: tuple[str, ...]) -> None:
        candidates = [extension for extension in extensions if extension in keys]
        ends = {"jpg": "image", "png": "image", "webp": "image", "txt": "text", "caption": "text"}
        parts = {(name, ends.get(end)) for name, _, end in (e.rpartition(".") for e in extensions)}
        pairs = {
            name for name, kind in parts if {(name, "image"), (name, "text")} <= parts and kind
        }
        pairs -= {candidate.rpartition(".")[0] for candidate in candidates}

        problem = image_problem(extensions, keys)
        if len(candidates) > 1:
            expected = "several-images"
        elif len(pairs) > 1 - len(candidates):
            expected = "several-samples"
        else:
            expected = "" if candidates else "no-image"
        assert (problem[0] if problem else "") == expected
        raw = RawSample("s.tar", "k", {extension: extension.encode() for extension in extensions})
        if problem:
            assert all(extension in problem[1] for extension in candidates)
            with pytest.raises(DataError):
                image_bytes(raw, keys)
        else:
            assert image_bytes(raw, keys).decode() == candidates[0]

    check_property(check, examples, st.lists(_EXTENSIONS, max_size=6, unique=True), _KEYS)


def test_index_and_check_count_samples_without_a_unique_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    png = make_png(1)
    (tmp_path / "a.tar").write_bytes(
        archive(
            {
                "0.depth.png": png,
                "0.png": png,
                "0.txt": b"a",
                "1.png": png,
                "1.jpg": png,
                "1.txt": b"b",
                "2.png": png,
                "2.txt": b"c",
                "2.5.png": png,
                "2.5.txt": b"d",
                "3.left.png": png,
                "3.txt": b"e",
            }
        )
    )
    manifest = index_shards(str(tmp_path))
    logged = "\n".join(caplog.messages)
    for reason in ("several-images: 1", "several-samples: 1", "no-image: 1"):
        assert reason in logged

    expected = [("several-images", 1, 0), ("several-samples", 1, 0), ("no-image", 1, 0)]
    assert sorted(check([manifest]).counts_by_reason()) == sorted(expected)
    caplog.clear()
    index_shards(str(tmp_path))  # from the existing index
    assert "several-images: 1" in "\n".join(caplog.messages)
    left = check([manifest], keys=SampleKeys(images=("left.png",)))
    assert {finding.sample for finding in left.findings} == {0, 1, 2}
