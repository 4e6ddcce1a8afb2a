"""Geometric transforms and views."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.content.image.rendering import WHITE, composite, hwc_to_chw
from data_pipeline.content.image.transforms import (
    eval_transform,
    train_transform,
)
from data_pipeline.content.image.views import (
    NUM_GEOMETRY_UNIFORMS,
    mode_view,
    random_view,
)
from data_pipeline.settings import AugmentConfig

ALL_OPERATIONS = AugmentConfig(
    flip=True,
    crop_scale=(0.5, 1.0),
    affine_degrees=15,
    affine_translate=0.1,
    affine_scale=(0.8, 1.2),
    random_background=True,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def uniforms(seed: int = 0) -> list[float]:
    """Random numbers of a sample."""
    return rng(seed).random(NUM_GEOMETRY_UNIFORMS).tolist()


def ramps(height: int, width: int) -> np.ndarray:
    """Red increases to the right, green downwards, blue is constant."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, x * 0 + 77.0], axis=-1).astype(np.uint8)


def disc(side: int, color: tuple[int, int, int], hidden: int) -> np.ndarray:
    """An antialiased disc of one color; transparent pixels have the gray `hidden`."""
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    alpha = (side / 3 - np.hypot(x, y) + 0.5).clip(0, 1)
    image = np.empty((side, side, 4), np.uint8)
    image[..., :3] = np.where(alpha[..., None] > 0, color, hidden)
    image[..., 3] = np.round(alpha * 255)
    return image


def test_output_shape_and_dtype() -> None:
    for shape in [(64, 64, 4), (50, 90, 3), (7, 5, 3), (1, 1, 4), (300, 40, 3)]:
        image = rng().integers(0, 256, shape, dtype=np.uint8)
        for out in (
            eval_transform(image, 48),
            train_transform(image, 48, ALL_OPERATIONS, uniforms()),
        ):
            assert out.shape == (3, 48, 48) and out.dtype == np.uint8 and out.flags.c_contiguous


def test_training_without_augmentation_equals_evaluation() -> None:
    for shape in [(64, 64, 4), (50, 90, 3), (48, 48, 3)]:
        image = rng(3).integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(
            train_transform(image, 48, AugmentConfig(), uniforms()), eval_transform(image, 48)
        )


def test_evaluation_uses_the_center_square_in_rgb_order() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :10], image[:, 10:20], image[:, 20:] = (255, 0, 0), (10, 20, 30), (0, 0, 255)
    out = eval_transform(image, 5)
    np.testing.assert_array_equal(
        out, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 5, 5))
    )


def test_halving_averages_blocks_of_two_by_two() -> None:
    image = rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(eval_transform(image, 32) - expected).max() <= 0.5 + 1e-6


def test_composite_equals_the_formula() -> None:
    image = rng().integers(0, 256, (40, 40, 4), dtype=np.uint8)
    alpha = image[..., 3:] / 255
    expected = image[..., :3] * alpha + np.array([9, 130, 251]) * (1 - alpha)
    assert np.abs(composite(image, (9, 130, 251)) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    "augment", [AugmentConfig(), AugmentConfig(affine_degrees=20, affine_scale=(0.7, 1.1))]
)
def test_color_of_transparent_pixels_has_no_influence(augment: AugmentConfig) -> None:
    """Otherwise edges would get darker."""
    for seed in range(5):
        black, gray = (
            train_transform(disc(64, (250, 200, 40), hidden), 48, augment, uniforms(seed))
            for hidden in (0, 128)
        )
        np.testing.assert_array_equal(black, gray)
        # A blend of the disc's color and white is never darker than the disc.
        assert (black >= np.array([250, 200, 40])[:, None, None] - 1).all()


def test_affine_equals_the_inverse_map() -> None:
    """The ramps encode the source position of each pixel."""
    image, size = ramps(128, 128), 64
    augment = AugmentConfig(affine_degrees=30, affine_translate=0.1, affine_scale=(1.1, 1.3))
    for seed in range(6):
        sampled = uniforms(seed)
        rotation = np.radians(30 * (2 * sampled[9] - 1))
        zoom = 1.1 + 0.2 * sampled[10]
        shift = [0.1 * (2 * u - 1) for u in (sampled[11], sampled[11] * 4096 % 1)]
        out = train_transform(image, size, augment, uniforms(seed))

        y, x = np.mgrid[0:size, 0:size] + 0.5
        dx, dy = x - size / 2 - shift[0] * size, y - size / 2 - shift[1] * size
        cos, sin, scale = np.cos(rotation), np.sin(rotation), 128 / size / zoom
        source_x = (cos * dx + sin * dy) * scale + 64
        source_y = (-sin * dx + cos * dy) * scale + 64
        inside = (abs(source_x - 64) < 60) & (abs(source_y - 64) < 60)
        assert inside.mean() > 0.5
        assert np.abs(out[0] - (source_x - 0.5) * 255 / 128)[inside].max() < 3
        assert np.abs(out[1] - (source_y - 0.5) * 255 / 128)[inside].max() < 3


def test_large_images_are_averaged() -> None:
    """A fine checkerboard becomes gray; a filter that skips pixels would keep black and white."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, axis=-1)
    out = train_transform(image, 32, AugmentConfig(affine_degrees=10), uniforms(1))
    assert np.abs(out.astype(int) - 127).max() < 16


def test_flip_with_probability_one_half() -> None:
    image = ramps(48, 48)
    plain = eval_transform(image, 48)
    num_flipped = 0
    for seed in range(200):
        out = train_transform(image, 48, AugmentConfig(flip=True), uniforms(seed))
        assert (out == plain).all() or (out == plain[..., ::-1]).all()
        num_flipped += bool((out == plain[..., ::-1]).all())
    assert 70 < num_flipped < 130


def test_flip_combined_with_affine() -> None:
    flipped = train_transform(
        ramps(64, 64), 48, AugmentConfig(flip=True, affine_scale=(1.1, 1.1)), uniforms(2)
    )
    kept = train_transform(ramps(64, 64), 48, AugmentConfig(affine_scale=(1.1, 1.1)), uniforms(2))
    assert uniforms(2)[8] < 0.5  # this seed flips
    assert np.abs(flipped.astype(int) - kept[..., ::-1]).max() <= 1


def test_background_is_white_or_random_with_contrast() -> None:
    image = disc(64, (20, 20, 20), 0)
    corners = []
    for seed in range(300):
        out = train_transform(image, 48, AugmentConfig(random_background=True), uniforms(seed))
        corners.append(tuple(int(value) for value in out[:, 0, 0]))
        assert np.abs(np.array(corners[-1]) - 20).sum() >= 90
    assert 100 < sum(corner == WHITE for corner in corners) < 200
    assert len(set(corners)) > 100


def test_background_is_white_by_default() -> None:
    image = disc(64, (20, 20, 20), 0)
    white = train_transform(image, 48, AugmentConfig(affine_degrees=40), uniforms())
    assert (white[:, 0, 0] == 255).all()


def test_random_crop_area() -> None:
    """On ramps, the remaining range of values gives the fraction of each side."""
    fractions = []
    for seed in range(100):
        out = train_transform(
            ramps(256, 256), 64, AugmentConfig(crop_scale=(0.25, 0.5)), uniforms(seed)
        ).astype(int)
        fractions.append(np.ptp(out[0]) / 252 * np.ptp(out[1]) / 252)
    assert min(fractions) > 0.22 and max(fractions) < 0.54 and np.std(fractions) > 0.03


def test_settings_do_not_affect_each_other() -> None:
    image = disc(64, (250, 200, 40), 0)
    np.testing.assert_array_equal(
        *(train_transform(image, 48, ALL_OPERATIONS, uniforms(7)) for _ in range(2))
    )
    views = [
        random_view(90, 50, augment, uniforms(7))
        for augment in (ALL_OPERATIONS, replace(ALL_OPERATIONS, flip=False))
    ]
    assert views[0]._replace(flip=False) == views[1]
    unrotated = random_view(90, 50, replace(ALL_OPERATIONS, affine_degrees=0.0), uniforms(7))
    assert unrotated == views[0]._replace(rotation=0.0) and views[0].rotation != 0
    assert random_view(90, 50, AugmentConfig(), uniforms(7)) == mode_view(90, 50)


def test_hwc_to_chw_writes_to_out() -> None:
    square = rng().integers(0, 256, (17, 17, 3), dtype=np.uint8)
    batch = np.zeros((2, 3, 17, 17), np.uint8)
    assert hwc_to_chw(square, batch[1]) is not None and not batch[0].any()
    np.testing.assert_array_equal(batch[1], square.transpose(2, 0, 1))
    strided = square[:, ::2][:9]
    np.testing.assert_array_equal(hwc_to_chw(strided), strided.transpose(2, 0, 1))


def test_hwc_to_chw_rejects_unsuitable_out() -> None:
    square = np.zeros((17, 17, 3), np.uint8)
    noncontiguous = np.zeros((17, 17, 3), np.uint8).transpose(2, 0, 1)
    outs = (np.empty((3, 17, 16), np.uint8), np.empty((3, 17, 17), np.float32), noncontiguous)
    for out in outs:
        with pytest.raises(ValueError, match="contiguous uint8"):
            hwc_to_chw(square, out)
