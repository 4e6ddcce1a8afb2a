"""Compared with the same changes made one after the other, in float64, pixel by pixel."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest

from data_pipeline.content.colors import GRAY_WEIGHTS, is_on, jitter
from data_pipeline.settings import AugmentConfig
from tests.support.pictures import photo


def slow(image: np.ndarray, augment: AugmentConfig, draws: list[float]) -> np.ndarray:
    """Brightness, contrast, saturation, hue: each as its setting describes it; clipped at the
    end."""
    factors = [
        1 + reach * (2 * draw - 1)
        for reach, draw in zip(
            (augment.brightness, augment.contrast, augment.saturation), draws, strict=False
        )
    ]
    pixels = image.astype(np.float64) * factors[0]
    gray = (pixels @ GRAY_WEIGHTS)[..., None]
    pixels = gray.mean() + factors[1] * (pixels - gray.mean())
    gray = (pixels @ GRAY_WEIGHTS)[..., None]
    pixels = gray + factors[2] * (pixels - gray)
    # A turn in the plane of blueness and redness (JFIF), at the same lightness.
    light = pixels @ GRAY_WEIGHTS
    blue, red = (pixels[..., 2] - light) / 1.772, (pixels[..., 0] - light) / 1.402
    angle = 2 * math.pi * augment.hue * (2 * draws[3] - 1)
    blue, red = (
        math.cos(angle) * blue - math.sin(angle) * red,
        math.sin(angle) * blue + math.cos(angle) * red,
    )
    r, b = light + 1.402 * red, light + 1.772 * blue
    g = (light - GRAY_WEIGHTS[0] * r - GRAY_WEIGHTS[2] * b) / GRAY_WEIGHTS[1]
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
def test_jitter_is_the_slow_formula(augment: AugmentConfig, seed: int) -> None:
    draws = (np.random.default_rng(seed).random(4) * 0.4).tolist()  # far from the middle
    image = photo(40, 56, seed)
    found = jitter(image, augment, draws)
    assert found.shape == image.shape and found.dtype == np.uint8
    assert np.abs(found - slow(image, augment, draws)).max() <= 1.0
    assert np.abs(found.astype(int) - image).max() > 3


def test_draws_in_the_middle_and_settings_of_zero_change_nothing() -> None:
    image = photo(40, 56)
    assert np.abs(jitter(image, STRONG, [0.5] * 4).astype(int) - image).max() <= 1
    assert (
        np.abs(jitter(image, AugmentConfig(), [0.0, 0.9, 0.1, 0.99]).astype(int) - image).max() <= 1
    )
    assert not is_on(AugmentConfig())
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert is_on(AugmentConfig(**{name: 0.1}))  # type: ignore[arg-type]


def test_extremes_mean_what_the_settings_say() -> None:
    image = photo(40, 56)
    gray = jitter(image, AugmentConfig(saturation=1.0), [0.5, 0.5, 0.0, 0.5]).astype(int)
    assert np.ptp(gray, axis=-1).max() <= 1
    flat = jitter(image, AugmentConfig(contrast=1.0), [0.5, 0.0, 0.5, 0.5]).astype(int)
    assert np.ptp(flat) <= 1
    assert abs(flat[0, 0, 0] - (image @ GRAY_WEIGHTS).mean()) <= 1
    assert jitter(image, AugmentConfig(brightness=1.0), [0.0, 0.5, 0.5, 0.5]).max() == 0


def test_hue_turns_colors_round_and_leaves_greys_and_lightness() -> None:
    quarter = [0.5, 0.5, 0.5, 0.75]
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    assert np.abs(jitter(ramp, AugmentConfig(hue=0.5), quarter).astype(int) - ramp).max() <= 1
    color = np.full((4, 4, 3), (150, 110, 100), np.uint8)
    turned = jitter(color, AugmentConfig(hue=0.5), quarter)
    assert abs(turned[0, 0] @ GRAY_WEIGHTS - color[0, 0] @ GRAY_WEIGHTS) <= 1
    before, after = (colorsys.rgb_to_hsv(*(pixels[0, 0] / 255))[0] for pixels in (color, turned))
    assert 0.15 < (before - after) % 1 < 0.35 or 0.15 < (after - before) % 1 < 0.35


def test_picture_content_does_not_matter_beyond_its_mean() -> None:
    """One matrix for all pixels: the change of a picture is the change of each of its parts."""
    image = photo(40, 40)
    moved = image[::-1, ::-1].copy()
    draws = [0.1, 0.8, 0.7, 0.2]
    np.testing.assert_array_equal(
        jitter(moved, STRONG, draws)[::-1, ::-1], jitter(image, STRONG, draws)
    )
