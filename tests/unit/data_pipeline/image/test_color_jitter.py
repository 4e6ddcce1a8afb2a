"""Color jitter, compared with the four operations applied one after the other in float64."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest

from data_pipeline.content.image.color_jitter import (
    GRAY_WEIGHTS,
    apply_color_jitter,
    color_jitter_enabled,
)
from data_pipeline.settings import AugmentConfig
from tests.support.images import synthetic_photo


def reference_jitter(
    image: np.ndarray, augment: AugmentConfig, uniforms: list[float]
) -> np.ndarray:
    """Brightness, contrast, saturation and hue one after the other, clipped at the end."""
    ranges = (augment.brightness, augment.contrast, augment.saturation)
    factors = [
        1 + strength * (2 * uniform - 1)
        for strength, uniform in zip(ranges, uniforms, strict=False)
    ]
    pixels = image.astype(np.float64) * factors[0]
    gray = (pixels @ GRAY_WEIGHTS)[..., None]
    pixels = gray.mean() + factors[1] * (pixels - gray.mean())
    gray = (pixels @ GRAY_WEIGHTS)[..., None]
    pixels = gray + factors[2] * (pixels - gray)

    # Rotation in the plane of the chroma axes Cb and Cr (JFIF) at constant luminance.
    luminance = pixels @ GRAY_WEIGHTS
    blue, red = (pixels[..., 2] - luminance) / 1.772, (pixels[..., 0] - luminance) / 1.402
    angle = 2 * math.pi * augment.hue * (2 * uniforms[3] - 1)
    blue, red = (
        math.cos(angle) * blue - math.sin(angle) * red,
        math.sin(angle) * blue + math.cos(angle) * red,
    )
    r, b = luminance + 1.402 * red, luminance + 1.772 * blue
    g = (luminance - GRAY_WEIGHTS[0] * r - GRAY_WEIGHTS[2] * b) / GRAY_WEIGHTS[1]
    return np.stack([r, g, b], axis=-1).clip(0, 255)


STRONG = AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.8, hue=0.5)


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(brightness=1.0),
        AugmentConfig(contrast=1.0),
        AugmentConfig(saturation=1.0),
        AugmentConfig(hue=0.5),
        STRONG,
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_jitter_equals_reference(augment: AugmentConfig, seed: int) -> None:
    uniforms = (np.random.default_rng(seed).random(4) * 0.4).tolist()  # 0.5 would be the identity
    image = synthetic_photo(40, 56, seed)
    jittered = apply_color_jitter(image, augment, uniforms)
    assert jittered.shape == image.shape and jittered.dtype == np.uint8
    assert np.abs(jittered - reference_jitter(image, augment, uniforms)).max() <= 1.0
    assert np.abs(jittered.astype(int) - image).max() > 3


def test_identity_for_central_uniforms_or_zero_settings() -> None:
    image = synthetic_photo(40, 56)
    central = apply_color_jitter(image, STRONG, [0.5] * 4)
    assert np.abs(central.astype(int) - image).max() <= 1
    disabled = apply_color_jitter(image, AugmentConfig(), [0.0, 0.9, 0.1, 0.99])
    assert np.abs(disabled.astype(int) - image).max() <= 1


def test_jitter_is_enabled_by_each_setting() -> None:
    assert not color_jitter_enabled(AugmentConfig())
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert color_jitter_enabled(AugmentConfig(**{name: 0.1}))  # type: ignore[arg-type]


def test_minimum_saturation_gives_grays() -> None:
    augment = AugmentConfig(saturation=1.0)
    gray = apply_color_jitter(synthetic_photo(40, 56), augment, [0.5, 0.5, 0.0, 0.5])
    assert np.ptp(gray.astype(int), axis=-1).max() <= 1


def test_minimum_contrast_gives_the_mean_gray() -> None:
    image = synthetic_photo(40, 56)
    flat = apply_color_jitter(image, AugmentConfig(contrast=1.0), [0.5, 0.0, 0.5, 0.5]).astype(int)
    assert np.ptp(flat) <= 1
    assert abs(flat[0, 0, 0] - (image @ GRAY_WEIGHTS).mean()) <= 1


def test_minimum_brightness_gives_black() -> None:
    augment = AugmentConfig(brightness=1.0)
    dark = apply_color_jitter(synthetic_photo(40, 56), augment, [0.0, 0.5, 0.5, 0.5])
    assert dark.max() == 0


def test_hue_rotates_colors_and_keeps_grays_and_luminance() -> None:
    augment, quarter_turn = AugmentConfig(hue=0.5), [0.5, 0.5, 0.5, 0.75]
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    rotated_ramp = apply_color_jitter(ramp, augment, quarter_turn)
    assert np.abs(rotated_ramp.astype(int) - ramp).max() <= 1

    color = np.full((4, 4, 3), (150, 110, 100), np.uint8)
    rotated = apply_color_jitter(color, augment, quarter_turn)
    assert abs(rotated[0, 0] @ GRAY_WEIGHTS - color[0, 0] @ GRAY_WEIGHTS) <= 1
    before, after = (colorsys.rgb_to_hsv(*(pixels[0, 0] / 255))[0] for pixels in (color, rotated))
    assert 0.15 < (before - after) % 1 < 0.35 or 0.15 < (after - before) % 1 < 0.35


def test_jitter_depends_on_the_image_only_through_its_mean() -> None:
    """The same matrix is applied to all pixels, so permuting pixels permutes the result."""
    image = synthetic_photo(40, 40)
    rotated = image[::-1, ::-1].copy()
    uniforms = [0.1, 0.8, 0.7, 0.2]
    np.testing.assert_array_equal(
        apply_color_jitter(rotated, STRONG, uniforms)[::-1, ::-1],
        apply_color_jitter(image, STRONG, uniforms),
    )
