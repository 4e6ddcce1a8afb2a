from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.content.images import decode, decode_pixels, read_header
from data_pipeline.content.transforms import (
    WHITE,
    composite,
    eval_transform,
    planes,
    render,
    train_transform,
)
from data_pipeline.content.views import (
    GEOMETRY_DRAWS,
    View,
    central_view,
    least_pixels,
    reduced_view,
    train_view,
)
from data_pipeline.settings import AugmentConfig
from tests.support.pictures import encoded, photo, psnr

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


def draws(seed: int = 0) -> list[float]:
    """A sample's numbers."""
    return rng(seed).random(GEOMETRY_DRAWS).tolist()


def ramps(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, blue is constant."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, x * 0 + 77.0], axis=-1).astype(np.uint8)


def disc(side: int, color: tuple[int, int, int], hidden: int) -> np.ndarray:
    """A soft-edged disc of one color; see-through pixels hold the gray `hidden`."""
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    alpha = (side / 3 - np.hypot(x, y) + 0.5).clip(0, 1)
    image = np.empty((side, side, 4), np.uint8)
    image[..., :3] = np.where(alpha[..., None] > 0, color, hidden)
    image[..., 3] = np.round(alpha * 255)
    return image


def test_shape_and_type_whatever_goes_in() -> None:
    for shape in [(64, 64, 4), (50, 90, 3), (7, 5, 3), (1, 1, 4), (300, 40, 3)]:
        image = rng().integers(0, 256, shape, dtype=np.uint8)
        for out in (eval_transform(image, 48), train_transform(image, 48, EVERYTHING, draws())):
            assert out.shape == (3, 48, 48) and out.dtype == np.uint8 and out.flags.c_contiguous


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    for shape in [(64, 64, 4), (50, 90, 3), (48, 48, 3)]:
        image = rng(3).integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(
            train_transform(image, 48, AugmentConfig(), draws()), eval_transform(image, 48)
        )


def test_eval_takes_the_central_square_in_rgb_order() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :10], image[:, 10:20], image[:, 20:] = (255, 0, 0), (10, 20, 30), (0, 0, 255)
    out = eval_transform(image, 5)
    np.testing.assert_array_equal(
        out, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 5, 5))
    )


def test_eval_halving_is_the_mean_of_two_by_two() -> None:
    image = rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(eval_transform(image, 32) - expected).max() <= 0.5 + 1e-6


def test_composite_is_the_textbook_formula() -> None:
    image = rng().integers(0, 256, (40, 40, 4), dtype=np.uint8)
    alpha = image[..., 3:] / 255
    expected = image[..., :3] * alpha + np.array([9, 130, 251]) * (1 - alpha)
    assert np.abs(composite(image, (9, 130, 251)) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    "augment", [AugmentConfig(), AugmentConfig(affine_degrees=20, affine_scale=(0.7, 1.1))]
)
def test_no_dark_rim_from_colors_that_nobody_sees(augment: AugmentConfig) -> None:
    """What see-through pixels hold must not change a single value of the result."""
    for seed in range(5):
        black, gray = (
            train_transform(disc(64, (250, 200, 40), hidden), 48, augment, draws(seed))
            for hidden in (0, 128)
        )
        np.testing.assert_array_equal(black, gray)
        # A mix of the disc's color and white is nowhere darker than the disc.
        assert (black >= np.array([250, 200, 40])[:, None, None] - 1).all()


def test_affine_moves_pixels_where_the_formula_says() -> None:
    """The ramps tell where each pixel came from: compare with the exact inverse map."""
    image, size = ramps(128, 128), 64
    augment = AugmentConfig(affine_degrees=30, affine_translate=0.1, affine_scale=(1.1, 1.3))
    for seed in range(6):
        numbers = draws(seed)
        turn = np.radians(30 * (2 * numbers[9] - 1))
        zoom = 1.1 + 0.2 * numbers[10]
        shift = [0.1 * (2 * draw - 1) for draw in (numbers[11], numbers[11] * 4096 % 1)]
        out = train_transform(image, size, augment, draws(seed))
        y, x = np.mgrid[0:size, 0:size] + 0.5
        back_x, back_y = x - size / 2 - shift[0] * size, y - size / 2 - shift[1] * size
        source_x = (np.cos(turn) * back_x + np.sin(turn) * back_y) * (128 / size) / zoom + 64
        source_y = (-np.sin(turn) * back_x + np.cos(turn) * back_y) * (128 / size) / zoom + 64
        inside = (abs(source_x - 64) < 60) & (abs(source_y - 64) < 60)
        assert inside.mean() > 0.5
        assert np.abs(out[0] - (source_x - 0.5) * 255 / 128)[inside].max() < 3
        assert np.abs(out[1] - (source_y - 0.5) * 255 / 128)[inside].max() < 3


def test_large_pictures_are_averaged_not_picked_from() -> None:
    """A fine checkerboard must turn gray; a filter that skips pixels would keep black and white."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, axis=-1)
    out = train_transform(image, 32, AugmentConfig(affine_degrees=10), draws(1))
    assert np.abs(out.astype(int) - 127).max() < 16


def test_flip_mirrors_half_of_the_pictures() -> None:
    image = ramps(48, 48)
    plain = eval_transform(image, 48)
    mirrored = 0
    for seed in range(200):
        out = train_transform(image, 48, AugmentConfig(flip=True), draws(seed))
        assert (out == plain).all() or (out == plain[..., ::-1]).all()
        mirrored += bool((out == plain[..., ::-1]).all())
    assert 70 < mirrored < 130


def test_flip_also_mirrors_under_an_affine_change() -> None:
    out = train_transform(
        ramps(64, 64), 48, AugmentConfig(flip=True, affine_scale=(1.1, 1.1)), draws(2)
    )
    kept = train_transform(ramps(64, 64), 48, AugmentConfig(affine_scale=(1.1, 1.1)), draws(2))
    assert draws(2)[8] < 0.5  # this seed mirrors
    assert np.abs(out.astype(int) - kept[..., ::-1]).max() <= 1


def test_background_is_white_half_of_the_time_and_never_hides_the_picture() -> None:
    image = disc(64, (20, 20, 20), 0)
    corners = []
    for seed in range(300):
        corner = train_transform(image, 48, AugmentConfig(random_background=True), draws(seed))[
            :, 0, 0
        ]
        corners.append(tuple(int(value) for value in corner))
        assert np.abs(np.array(corners[-1]) - 20).sum() >= 90
    assert 100 < sum(corner == WHITE for corner in corners) < 200
    assert len(set(corners)) > 100
    white = train_transform(image, 48, AugmentConfig(affine_degrees=40), draws())
    assert (white[:, 0, 0] == 255).all()


def test_random_crop_keeps_the_asked_share() -> None:
    """On ramps the range of values left tells how much of each side was kept."""
    shares = []
    for seed in range(100):
        out = train_transform(
            ramps(256, 256), 64, AugmentConfig(crop_scale=(0.25, 0.5)), draws(seed)
        ).astype(int)
        shares.append(np.ptp(out[0]) / 252 * np.ptp(out[1]) / 252)
    assert min(shares) > 0.22 and max(shares) < 0.54 and np.std(shares) > 0.03


def test_a_setting_does_not_change_what_the_others_draw() -> None:
    image = disc(64, (250, 200, 40), 0)
    np.testing.assert_array_equal(
        *(train_transform(image, 48, EVERYTHING, draws(7)) for _ in range(2))
    )
    views = [
        train_view(90, 50, augment, draws(7))
        for augment in (EVERYTHING, replace(EVERYTHING, flip=False))
    ]
    assert views[0]._replace(flip=False) == views[1]
    still = train_view(90, 50, replace(EVERYTHING, affine_degrees=0.0), draws(7))
    assert still == views[0]._replace(turn=0.0) and views[0].turn != 0
    assert train_view(90, 50, AugmentConfig(), draws(7)) == central_view(90, 50)


def test_planes_fills_the_place_it_is_given() -> None:
    square = rng().integers(0, 256, (17, 17, 3), dtype=np.uint8)
    batch = np.zeros((2, 3, 17, 17), np.uint8)
    assert planes(square, batch[1]) is not None and not batch[0].any()
    np.testing.assert_array_equal(batch[1], square.transpose(2, 0, 1))
    np.testing.assert_array_equal(planes(square[:, ::2][:9]), square[:, ::2][:9].transpose(2, 0, 1))
    across = np.zeros((17, 17, 3), np.uint8).transpose(2, 0, 1)
    for bad in (np.empty((3, 17, 16), np.uint8), np.empty((3, 17, 17), np.float32), across):
        with pytest.raises(ValueError, match="not contiguous uint8"):
            planes(square, bad)


# A photograph that is decoded at a half, a quarter or an eighth of its size must look as if it had
# been decoded whole. What is compared with: all pixels, the same part of the picture, area
# averages.

REDUCED = [(768, 1024, 2), (1023, 779, 2), (1531, 1999, 4)]
"""Height, width, and the largest reduction that the model's 224 pixels allow."""


@pytest.mark.parametrize(("height", "width", "most"), REDUCED)
def test_a_reduced_picture_looks_like_the_whole_one(height: int, width: int, most: int) -> None:
    data = encoded(photo(height, width), "JPEG", quality=90)
    header, whole = read_header(data), decode(data)
    crop = AugmentConfig(crop_scale=(0.5, 1.0), flip=True)
    used = set()
    for augment in (AugmentConfig(), crop):
        for seed in range(3):
            view = train_view(width, height, augment, draws(seed))
            enough = least_pixels(view, width, height, 224)
            pixels, reduced = decode_pixels(data, header, enough)
            used.add(reduced)
            if reduced > 1:
                smaller = reduced_view(view, reduced, width, height)
                expected = render(whole, smaller.scaled(reduced, reduced), 224)
                assert psnr(render(pixels, smaller, 224), expected) > 36
    assert max(used) == most


def test_a_reduced_picture_that_is_turned_is_as_good_as_the_whole_one() -> None:
    """The ideal, of which both are approximations: the average of four by four points in each
    pixel."""
    data = encoded(photo(1531, 1999), "JPEG", quality=90)
    header, whole = read_header(data), decode(data)
    for seed in range(3):
        view = train_view(
            1999, 1531, AugmentConfig(affine_degrees=15, affine_scale=(0.9, 1.1)), draws(seed)
        )
        pixels, reduced = decode_pixels(data, header, least_pixels(view, 1999, 1531, 224))
        assert reduced == 2
        ideal = render(whole, view, 4 * 224).reshape(224, 4, 224, 4, 3).mean(axis=(1, 3))
        usual, found = (
            render(whole, view, 224),
            render(pixels, reduced_view(view, 2, 1999, 1531), 224),
        )
        assert psnr(found, ideal) > psnr(usual, ideal) - 0.5
        assert psnr(found, usual) > 34


def test_the_part_that_is_seen_moves_by_less_than_a_third_of_a_pixel() -> None:
    for seed in range(300):
        height, width = (int(side) for side in rng(seed).integers(700, 4000, 2))
        view = train_view(width, height, AugmentConfig(crop_scale=(0.2, 1.0)), draws(seed))
        enough = least_pixels(view, width, height, 224)
        if enough is None:
            continue
        reduced = max(r for r in (8, 4, 2, 1) if height >= r * enough[0] and width >= r * enough[1])
        if reduced == 1:
            continue
        found = reduced_view(view, reduced, width, height)
        assert min(found.width, found.height) >= 1.65 * 224  # what is left still shrinks
        assert (
            found.left + found.width <= width / reduced
            and found.top + found.height <= height / reduced
        )
        pixel = min(view.width, view.height) / 224  # one of the model's, in the file's
        moved = [
            found.left * reduced - view.left,
            found.top * reduced - view.top,
            (found.left + found.width) * reduced - (view.left + view.width),
            (found.top + found.height) * reduced - (view.top + view.height),
        ]
        assert max(map(abs, moved[:2])) <= reduced / 2 + 1e-9 < pixel / 3
        assert max(map(abs, moved[2:])) < reduced < pixel / 1.6


def test_nothing_is_reduced_where_all_pixels_are_needed() -> None:
    assert least_pixels(View(0, 0, 300, 300), 300, 300, 224) is None
    assert least_pixels(View(100, 100, 300, 900), 4000, 3000, 224) is None
    assert least_pixels(View(0, 0, 1000, 1000, zoom=2.0), 1000, 1000, 224) is None
    assert least_pixels(View(0, 0, 1000, 1000), 2000, 1000, 224) == (381, 762)
