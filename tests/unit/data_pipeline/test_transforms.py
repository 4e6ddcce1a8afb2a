from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.content.transforms import WHITE, composite, eval_transform, train_transform
from data_pipeline.settings import AugmentConfig

EVERYTHING = AugmentConfig(
    flip=True,
    crop_scale=(0.5, 1.0),
    affine_degrees=15,
    affine_translate=0.1,
    affine_scale=(0.8, 1.2),
    random_background=True,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ramps(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, blue is constant."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, x * 0 + 77.0], axis=-1).astype(np.uint8)


def disc(side: int, colour: tuple[int, int, int], hidden: int) -> np.ndarray:
    """A soft-edged disc of one colour; see-through pixels hold the grey `hidden`."""
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    alpha = (side / 3 - np.hypot(x, y) + 0.5).clip(0, 1)
    image = np.empty((side, side, 4), np.uint8)
    image[..., :3] = np.where(alpha[..., None] > 0, colour, hidden)
    image[..., 3] = np.round(alpha * 255)
    return image


def test_shape_and_type_whatever_goes_in() -> None:
    for shape in [(64, 64, 4), (50, 90, 3), (7, 5, 3), (1, 1, 4), (300, 40, 3)]:
        image = rng().integers(0, 256, shape, dtype=np.uint8)
        for out in (eval_transform(image, 48), train_transform(image, 48, EVERYTHING, rng())):
            assert out.shape == (3, 48, 48) and out.dtype == np.uint8 and out.flags.c_contiguous


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    for shape in [(64, 64, 4), (50, 90, 3), (48, 48, 3)]:
        image = rng(3).integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(train_transform(image, 48, AugmentConfig(), rng()), eval_transform(image, 48))


def test_eval_takes_the_central_square_in_rgb_order() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :10], image[:, 10:20], image[:, 20:] = (255, 0, 0), (10, 20, 30), (0, 0, 255)
    out = eval_transform(image, 5)
    np.testing.assert_array_equal(out, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 5, 5)))


def test_eval_halving_is_the_mean_of_two_by_two() -> None:
    image = rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(eval_transform(image, 32) - expected).max() <= 0.5 + 1e-6


def test_composite_is_the_textbook_formula() -> None:
    image = rng().integers(0, 256, (40, 40, 4), dtype=np.uint8)
    alpha = image[..., 3:] / 255
    expected = image[..., :3] * alpha + np.array([9, 130, 251]) * (1 - alpha)
    assert np.abs(composite(image, (9, 130, 251)) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(affine_degrees=20, affine_scale=(0.7, 1.1))])
def test_no_dark_rim_from_colours_that_nobody_sees(augment: AugmentConfig) -> None:
    """What see-through pixels hold must not change a single value of the result."""
    for seed in range(5):
        black, grey = (
            train_transform(disc(64, (250, 200, 40), hidden), 48, augment, rng(seed)) for hidden in (0, 128)
        )
        np.testing.assert_array_equal(black, grey)
        # A mix of the disc's colour and white is nowhere darker than the disc.
        assert (black >= np.array([250, 200, 40])[:, None, None] - 1).all()


def test_affine_moves_pixels_where_the_formula_says() -> None:
    """The ramps tell where each pixel came from: compare with the exact inverse map."""
    image, size = ramps(128, 128), 64
    augment = AugmentConfig(affine_degrees=30, affine_translate=0.1, affine_scale=(1.1, 1.3))
    for seed in range(6):
        draws = rng(seed).random(12)
        turn = np.radians(30 * (2 * draws[9] - 1))
        zoom = 1.1 + 0.2 * draws[10]
        shift = [0.1 * (2 * draw - 1) for draw in (draws[11], draws[11] * 4096 % 1)]
        out = train_transform(image, size, augment, rng(seed))
        y, x = np.mgrid[0:size, 0:size] + 0.5
        back_x, back_y = x - size / 2 - shift[0] * size, y - size / 2 - shift[1] * size
        source_x = (np.cos(turn) * back_x + np.sin(turn) * back_y) * (128 / size) / zoom + 64
        source_y = (-np.sin(turn) * back_x + np.cos(turn) * back_y) * (128 / size) / zoom + 64
        inside = (abs(source_x - 64) < 60) & (abs(source_y - 64) < 60)
        assert inside.mean() > 0.5
        assert np.abs(out[0] - (source_x - 0.5) * 255 / 128)[inside].max() < 3
        assert np.abs(out[1] - (source_y - 0.5) * 255 / 128)[inside].max() < 3


def test_large_pictures_are_averaged_not_picked_from() -> None:
    """A fine checkerboard must turn grey; a filter that skips pixels would keep black and white."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, axis=-1)
    out = train_transform(image, 32, AugmentConfig(affine_degrees=10), rng(1))
    assert np.abs(out.astype(int) - 127).max() < 16


def test_flip_mirrors_half_of_the_pictures() -> None:
    image = ramps(48, 48)
    plain = eval_transform(image, 48)
    mirrored = 0
    for seed in range(200):
        out = train_transform(image, 48, AugmentConfig(flip=True), rng(seed))
        assert (out == plain).all() or (out == plain[..., ::-1]).all()
        mirrored += bool((out == plain[..., ::-1]).all())
    assert 70 < mirrored < 130


def test_flip_also_mirrors_under_an_affine_change() -> None:
    out = train_transform(ramps(64, 64), 48, AugmentConfig(flip=True, affine_scale=(1.1, 1.1)), rng(2))
    kept = train_transform(ramps(64, 64), 48, AugmentConfig(affine_scale=(1.1, 1.1)), rng(2))
    assert rng(2).random(12)[8] < 0.5  # this seed mirrors
    assert np.abs(out.astype(int) - kept[..., ::-1]).max() <= 1


def test_background_is_white_half_of_the_time_and_never_hides_the_picture() -> None:
    image = disc(64, (20, 20, 20), 0)
    corners = []
    for seed in range(300):
        corner = train_transform(image, 48, AugmentConfig(random_background=True), rng(seed))[:, 0, 0]
        corners.append(tuple(int(value) for value in corner))
        assert np.abs(np.array(corners[-1]) - 20).sum() >= 90
    assert 100 < sum(corner == WHITE for corner in corners) < 200
    assert len(set(corners)) > 100
    white = train_transform(image, 48, AugmentConfig(affine_degrees=40), rng())
    assert (white[:, 0, 0] == 255).all()


def test_random_crop_keeps_the_asked_share() -> None:
    """On ramps the range of values left tells how much of each side was kept."""
    shares = []
    for seed in range(100):
        out = train_transform(ramps(256, 256), 64, AugmentConfig(crop_scale=(0.25, 0.5)), rng(seed)).astype(int)
        shares.append(np.ptp(out[0]) / 252 * np.ptp(out[1]) / 252)
    assert min(shares) > 0.22 and max(shares) < 0.54 and np.std(shares) > 0.03


def test_the_same_generator_gives_the_same_picture_and_settings_do_not_shift_its_draws() -> None:
    image = disc(64, (250, 200, 40), 0)
    first, again = (train_transform(image, 48, EVERYTHING, rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    left = []
    for augment in (EVERYTHING, AugmentConfig(), replace(EVERYTHING, flip=False)):
        generator = rng(7)
        train_transform(image, 48, augment, generator)
        left.append(generator.random())
    assert left[0] == left[1] == left[2]
