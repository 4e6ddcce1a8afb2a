"""Processing of whole samples, and the random numbers that it uses."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 - the processor is pickled for worker processes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.captions import hash_caption
from data_pipeline.content.image import (
    NUM_GEOMETRY_UNIFORMS,
    decode_image,
    eval_transform,
    transforms,
    uniform_numbers,
)
from data_pipeline.content.image.color_jitter import apply_color_jitter
from data_pipeline.content.image.rendering import hwc_to_chw
from data_pipeline.content.image.transforms import NUM_COLOR_UNIFORMS, train_transform
from data_pipeline.content.sample_processor import (
    SampleProcessor,
)
from data_pipeline.sample_keys import IMAGE_KEYS
from data_pipeline.samples import ProcessedSample, RawSample
from data_pipeline.settings import AugmentConfig, FilterConfig
from tests.support.images import encode_image, gradient_image, psnr, synthetic_photo

GEOMETRIC = AugmentConfig(
    flip=True, crop_scale=(0.4, 1.0), affine_degrees=10, random_background=True
)
COLORED = replace(GEOMETRIC, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


class CodePointTokenizer:
    """Encodes each character as its code point."""

    def encode_truncated(self, caption: str, max_length: int) -> tuple[list[int], bool]:
        return [1, *map(ord, caption[: max_length - 2]), 2], len(caption) > max_length - 2


def make_processor(**changes: Any) -> SampleProcessor:
    defaults: dict[str, Any] = {
        "image_size": 24,
        "context_length": 16,
        "caption_keys": ("txt", "json:more"),
        "caption_weights": (1.0, 1.0),
        "seed": 5,
        "augment": GEOMETRIC,
    }
    return SampleProcessor(**defaults | changes)


def make_sample(key: str = "k", **members: bytes) -> RawSample:
    defaults = {
        "png": encode_image(gradient_image(40, 60, channels=4), "PNG"),
        "txt": b"A  cat",
        "json": json.dumps({"more": ["one", "two"]}).encode(),
    }
    return RawSample("s.tar", key, defaults | members)


def process(
    processor: SampleProcessor, sample: RawSample, epoch: int = 0, out: np.ndarray | None = None
) -> ProcessedSample:
    return processor.process(sample, epoch, CodePointTokenizer(), out)  # type: ignore[arg-type]


def test_process_combines_its_steps() -> None:
    for epoch in range(6):
        processed = process(make_processor(), make_sample(), epoch)
        uniforms = uniform_numbers(b"sample", 5, epoch, "s.tar", "k")
        expected = train_transform(
            decode_image(make_sample().members["png"]),
            24,
            GEOMETRIC,
            uniforms[:NUM_GEOMETRY_UNIFORMS],
        )
        np.testing.assert_array_equal(processed.image_CHW, expected)
        captions = ["A cat"] if uniforms[12] < 0.5 else ["one", "two"]
        assert processed.caption == captions[int(uniforms[13] * len(captions))]
        assert processed.ids == [1, *map(ord, processed.caption), 2]
        # The hash is that of the first caption, whichever was selected.
        assert processed.caption_hash == hash_caption("a cat")
        assert processed.key == "k"


def test_evaluation_is_not_random() -> None:
    processor = make_processor(augment=None, caption_keys=("json:more", "txt"))
    for epoch in (0, 1):
        processed = process(processor, make_sample(), epoch)
        np.testing.assert_array_equal(
            processed.image_CHW, eval_transform(decode_image(make_sample().members["png"]), 24)
        )
        assert processed.caption == "one"


def test_same_sample_on_any_worker_and_another_in_each_epoch() -> None:
    def unpickled_processor() -> SampleProcessor:
        return pickle.loads(pickle.dumps(make_processor(augment=COLORED)))  # noqa: S301

    first, again = (process(unpickled_processor(), make_sample(), 3) for _ in range(2))
    np.testing.assert_array_equal(first.image_CHW, again.image_CHW)
    others = [
        process(make_processor(augment=COLORED), make_sample(), 4),
        process(make_processor(augment=COLORED, seed=6), make_sample(), 3),
        process(make_processor(augment=COLORED), make_sample("l"), 3),
        process(make_processor(augment=COLORED), make_sample()._replace(shard="t.tar"), 3),
    ]
    assert all((other.image_CHW != first.image_CHW).mean() > 0.5 for other in others)


def test_color_jitter_does_not_change_other_random_numbers() -> None:
    for epoch in range(4):
        plain, colored = (
            process(make_processor(augment=augment), make_sample(), epoch)
            for augment in (GEOMETRIC, COLORED)
        )
        assert colored.caption == plain.caption
        uniforms = uniform_numbers(b"colour", 5, epoch, "s.tar", "k")[:NUM_COLOR_UNIFORMS]
        image_HWC = np.ascontiguousarray(plain.image_CHW.transpose(1, 2, 0))
        expected = hwc_to_chw(apply_color_jitter(image_HWC, COLORED, uniforms))
        np.testing.assert_array_equal(colored.image_CHW, expected)
        assert (colored.image_CHW != plain.image_CHW).mean() > 0.5


@pytest.mark.parametrize("augment", [None, AugmentConfig(), GEOMETRIC, COLORED])
def test_image_is_written_to_out(augment: AugmentConfig | None) -> None:
    batch = np.full((3, 3, 24, 24), 77, np.uint8)
    for sample in (make_sample(), make_sample(png=encode_image(gradient_image(24, 24), "PNG"))):
        processor = make_processor(augment=augment)
        processed = process(processor, sample, 0, batch[1])
        assert np.shares_memory(processed.image_CHW, batch)
        np.testing.assert_array_equal(batch[1], process(processor, sample).image_CHW)
        assert (batch[[0, 2]] == 77).all()


def test_scaled_jpeg_decoding_only_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = make_sample(jpg=encode_image(synthetic_photo(400, 656), "JPEG", quality=92))
    del sample.members["png"]
    full = decode_image(sample.members["jpg"])
    reductions: list[int] = []
    original = transforms.decode_pixels

    def recorded(*args: Any) -> tuple[np.ndarray, int]:
        pixels, reduction = original(*args)
        reductions.append(reduction)
        return pixels, reduction

    monkeypatch.setattr(transforms, "decode_pixels", recorded)
    for size, reduction in ((24, 8), (50, 4), (100, 2), (200, 1)):
        processed = process(make_processor(augment=AugmentConfig(), image_size=size), sample)
        assert psnr(processed.image_CHW, eval_transform(full, size)) > 33
        exact = process(make_processor(augment=None, image_size=size), sample)
        np.testing.assert_array_equal(exact.image_CHW, eval_transform(full, size))
        assert reductions == [reduction, 1]
        reductions.clear()


def test_other_members_are_never_read() -> None:
    class Unreadable(bytes):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"access to {name}")

    names = "pyd pkl pickle pth pt npy npz cls sh py exe jpg.pkl txt.npy index"
    others = {name: Unreadable() for name in names.split()}
    sample = RawSample("s.tar", "k", others | make_sample().members)
    expected = process(make_processor(), make_sample())
    np.testing.assert_array_equal(process(make_processor(), sample).image_CHW, expected.image_CHW)
    with pytest.raises(DataError) as caught:
        process(make_processor(), RawSample("s.tar", "k", others | {"txt": b"x"}))
    assert caught.value.slug == "no-image"
    with pytest.raises(DataError) as caught:
        process(
            make_processor(),
            RawSample("s.tar", "k", others | {"png": make_sample().members["png"]}),
        )
    assert caught.value.slug == "no-caption"
    assert not {"pkl", "npy", "pth", "pyd", "sh"} & set(IMAGE_KEYS)


def test_the_image_is_the_file_with_the_exact_extension() -> None:
    sample = RawSample(
        "s.tar",
        "k",
        {
            "left.png": encode_image(np.zeros((24, 24, 3), np.uint8), "PNG"),
            "png": encode_image(np.full((24, 24, 3), 255, np.uint8), "PNG"),
            "txt": b"x",
        },
    )
    assert process(make_processor(augment=None), sample).image_CHW.min() == 255


def test_cheap_checks_precede_expensive_ones() -> None:
    invalid = make_sample(png=b"", txt=b" ", json=b"{}")
    with pytest.raises(DataError) as caught:
        process(make_processor(filters=FilterConfig(require=("json:a > 1",))), invalid)
    assert caught.value.slug == "filter:a"
    with pytest.raises(DataError) as caught:
        process(make_processor(), invalid)
    assert caught.value.slug == "no-caption"


def test_invalid_caption_key() -> None:
    with pytest.raises(ConfigError, match=r"caption_keys.*'pkl'"):
        make_processor(caption_keys=("pkl", "txt"))


def test_truncated_captions_are_marked() -> None:
    for length, is_truncated in ((14, False), (15, True)):
        sample = process(
            make_processor(caption_keys=("txt",), caption_weights=(1.0,)),
            make_sample(txt=b"x" * length),
        )
        assert (sample.is_truncated, len(sample.ids)) == (is_truncated, 16)
