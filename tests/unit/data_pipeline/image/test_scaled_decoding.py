"""Views of JPEGs that are decoded at 1/2, 1/4 or 1/8 of their size.

The result is compared with the same view of the fully decoded image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.content.image.decoding import decode_image, decode_pixels
from data_pipeline.content.image.header import read_header
from data_pipeline.content.image.rendering import render
from data_pipeline.content.image.views import (
    NUM_GEOMETRY_UNIFORMS,
    View,
    min_decode_size,
    random_view,
    scale_view,
)
from data_pipeline.settings import AugmentConfig
from tests.support.images import encode_image, exif_block, gradient_image, psnr, synthetic_photo


def uniforms(seed: int = 0) -> list[float]:
    """Random numbers of a sample."""
    return np.random.default_rng(seed).random(NUM_GEOMETRY_UNIFORMS).tolist()


SIZES = [(768, 1024, 2), (1023, 779, 2), (1531, 1999, 4)]
"""Height, width, and the maximum reduction for a model input of 224 pixels."""


@pytest.mark.parametrize(("height", "width", "max_reduction"), SIZES)
def test_scaled_decoding_is_close_to_full_decoding(
    height: int, width: int, max_reduction: int
) -> None:
    data = encode_image(synthetic_photo(height, width), "JPEG", quality=90)
    header, full = read_header(data), decode_image(data)
    crop = AugmentConfig(crop_scale=(0.5, 1.0), flip=True)
    reductions = set()
    for augment in (AugmentConfig(), crop):
        for seed in range(3):
            view = random_view(width, height, augment, uniforms(seed))
            min_size = min_decode_size(view, width, height, 224)
            pixels, reduction = decode_pixels(data, header, min_size)
            reductions.add(reduction)
            if reduction > 1:
                scaled = scale_view(view, reduction, width, height)
                expected = render(full, scaled.scaled(reduction, reduction), 224)
                assert psnr(render(pixels, scaled, 224), expected) > 36
    assert max(reductions) == max_reduction


def test_rotated_view_after_scaled_decoding() -> None:
    """Both decodings approximate the ideal, which averages 4 x 4 points per pixel, equally well."""
    data = encode_image(synthetic_photo(1531, 1999), "JPEG", quality=90)
    header, full = read_header(data), decode_image(data)
    for seed in range(3):
        view = random_view(
            1999, 1531, AugmentConfig(affine_degrees=15, affine_scale=(0.9, 1.1)), uniforms(seed)
        )
        pixels, reduction = decode_pixels(data, header, min_decode_size(view, 1999, 1531, 224))
        assert reduction == 2

        ideal = render(full, view, 4 * 224).reshape(224, 4, 224, 4, 3).mean(axis=(1, 3))
        from_full = render(full, view, 224)
        from_scaled = render(pixels, scale_view(view, 2, 1999, 1531), 224)
        assert psnr(from_scaled, ideal) > psnr(from_full, ideal) - 0.5
        assert psnr(from_scaled, from_full) > 34


def test_crop_edges_move_by_less_than_a_third_of_a_pixel() -> None:
    for seed in range(300):
        height, width = (int(side) for side in np.random.default_rng(seed).integers(700, 4000, 2))
        view = random_view(width, height, AugmentConfig(crop_scale=(0.2, 1.0)), uniforms(seed))
        min_size = min_decode_size(view, width, height, 224)
        if min_size is None:
            continue
        sufficient = [
            r for r in (8, 4, 2, 1) if height >= r * min_size[0] and width >= r * min_size[1]
        ]
        reduction = max(sufficient)
        if reduction == 1:
            continue

        scaled = scale_view(view, reduction, width, height)
        assert min(scaled.width, scaled.height) >= 1.65 * 224  # rendering still shrinks
        assert (
            scaled.left + scaled.width <= width / reduction
            and scaled.top + scaled.height <= height / reduction
        )

        pixel = min(view.width, view.height) / 224  # of the model's input, in pixels of the file
        moved = [
            scaled.left * reduction - view.left,
            scaled.top * reduction - view.top,
            (scaled.left + scaled.width) * reduction - (view.left + view.width),
            (scaled.top + scaled.height) * reduction - (view.top + view.height),
        ]
        assert max(map(abs, moved[:2])) <= reduction / 2 + 1e-9 < pixel / 3
        assert max(map(abs, moved[2:])) < reduction < pixel / 1.6


def test_min_decode_size_is_none_if_all_pixels_are_needed() -> None:
    assert min_decode_size(View(0, 0, 300, 300), 300, 300, 224) is None
    assert min_decode_size(View(100, 100, 300, 900), 4000, 3000, 224) is None
    assert min_decode_size(View(0, 0, 1000, 1000, zoom=2.0), 1000, 1000, 224) is None
    assert min_decode_size(View(0, 0, 1000, 1000), 2000, 1000, 224) == (381, 762)


@pytest.mark.parametrize("options", [{"subsampling": 2}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize(("height", "width"), [(256, 384), (257, 383), (250, 390)])
def test_scaled_jpeg_decoding(height: int, width: int, options: dict[str, Any]) -> None:
    """Each pixel is nearly the mean of a block of pixels of the full image."""
    data = encode_image(synthetic_photo(height, width), "JPEG", quality=90, **options)
    for min_size, expected in [
        ((31, 31), 8),
        ((33, 33), 4),
        ((100, 100), 2),
        ((129, 1), 1),
        ((9999, 9999), 1),
    ]:
        assert checked_reduction(data, min_size) == expected


@pytest.mark.parametrize("orientation", range(2, 9))
def test_scaled_decoding_with_orientation_requires_divisible_size(orientation: int) -> None:
    """With another size, the pixels would be shifted."""
    for (height, width), expected in [
        ((256, 384), 8),
        ((260, 388), 4),
        ((258, 386), 2),
        ((257, 384), 1),
    ]:
        image = synthetic_photo(height, width)
        data = encode_image(image, "JPEG", quality=90, exif=exif_block(orientation))
        assert checked_reduction(data, (30, 30)) == expected


def checked_reduction(data: bytes, min_size: tuple[int, int]) -> int:
    """The reduction, after comparing the pixels with block means of the full image."""
    header, full = read_header(data), decode_image(data)
    pixels, reduction = decode_pixels(data, header, min_size)
    assert pixels.shape == (-(-header.height // reduction), -(-header.width // reduction), 3)

    rows, columns = header.height // reduction, header.width // reduction
    blocks = full[: rows * reduction, : columns * reduction].reshape(
        rows, reduction, columns, reduction, 3
    )
    # A shift by one pixel would give about 20 dB.
    assert psnr(pixels[:rows, :columns], blocks.mean(axis=(1, 3))) > 30
    return reduction


def test_only_jpeg_is_decoded_scaled() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode_image(gradient_image(64, 96), kind)
        pixels, reduction = decode_pixels(data, read_header(data), (30, 40))
        assert (pixels.shape[:2], reduction) == (((32, 48), 2) if kind == "JPEG" else ((64, 96), 1))
