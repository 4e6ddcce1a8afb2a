"""`data.image_mode`: what becomes of images that are not square."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from data_pipeline.content.image import eval_image, eval_transform, read_header, train_image
from data_pipeline.content.image.transforms import train_transform
from data_pipeline.content.image.views import NUM_GEOMETRY_UNIFORMS, mode_view
from data_pipeline.settings import AugmentConfig, ImageMode
from tests.support.images import encode_image

WIDTH, HEIGHT, SIZE = 96, 48, 24
MODES: tuple[ImageMode, ...] = ("crop", "pad", "squash", "random_crop")


def ramps() -> np.ndarray:
    """Red increases from left to right, green from top to bottom; blue is 200."""
    image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    image[..., 0] = np.linspace(0, 190, WIDTH)[None]
    image[..., 1] = np.linspace(0, 190, HEIGHT)[:, None]
    return image


def uniforms(seed: int) -> list[float]:
    return np.random.default_rng(seed).random(NUM_GEOMETRY_UNIFORMS).tolist()


def test_crop_is_the_center_square() -> None:
    square = eval_transform(ramps(), SIZE, "crop")
    assert square[0, 0, 0] == pytest.approx(190 / 4, abs=4)
    assert square[0, 0, -1] == pytest.approx(190 * 3 / 4, abs=4)
    np.testing.assert_array_equal(square, eval_transform(ramps(), SIZE))


def test_squash_keeps_both_edges() -> None:
    square = eval_transform(ramps(), SIZE, "squash")
    expected = cv2.resize(ramps(), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    assert np.abs(square.transpose(1, 2, 0).astype(int) - expected).max() <= 8
    assert square[0, 0, 0] < 8 and square[0, 0, -1] > 182


@pytest.mark.parametrize("transposed", [False, True])
def test_pad_keeps_the_whole_image_on_white(transposed: bool) -> None:
    image = ramps().swapaxes(0, 1) if transposed else ramps()
    square = eval_transform(np.ascontiguousarray(image), SIZE, "pad").transpose(1, 2, 0)
    square = square.swapaxes(0, 1) if transposed else square
    assert (square[:6] == 255).all() and (square[18:] == 255).all()
    inner = square[6:18]
    expected = cv2.resize(ramps(), (SIZE, SIZE // 2), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(inner, expected)


def test_random_crops_move_along_the_longer_side_only() -> None:
    lefts = set()
    for seed in range(40):
        view = mode_view(WIDTH, HEIGHT, "random_crop", uniforms(seed)[2:4])
        assert (view.top, view.width, view.height) == (0, HEIGHT, HEIGHT)
        lefts.add(view.left)
    assert len(lefts) > 15 and min(lefts) >= 0 and max(lefts) <= WIDTH - HEIGHT
    np.testing.assert_array_equal(
        eval_transform(ramps(), SIZE, "random_crop"), eval_transform(ramps(), SIZE, "crop")
    )


@pytest.mark.parametrize("mode", MODES)
def test_square_images_and_training_without_augmentation_equal_evaluation(mode: ImageMode) -> None:
    square = np.ascontiguousarray(ramps()[:, :HEIGHT])
    np.testing.assert_array_equal(
        eval_transform(square, SIZE, mode), eval_transform(square, SIZE, "crop")
    )
    data = encode_image(ramps(), "PNG")
    header = read_header(data)
    trained = train_image(data, header, SIZE, AugmentConfig(), uniforms(3), mode=mode)
    if mode != "random_crop":
        np.testing.assert_array_equal(trained, eval_image(data, header, SIZE, mode))


@pytest.mark.parametrize("mode", ["pad", "squash"])
def test_reduced_decoding_of_large_jpeg_files(mode: ImageMode) -> None:
    large = cv2.resize(ramps(), (WIDTH * 12, HEIGHT * 12), interpolation=cv2.INTER_LINEAR)
    data = encode_image(large, "JPEG")
    header = read_header(data)
    reduced = train_image(data, header, SIZE, AugmentConfig(), uniforms(1), mode=mode)
    full = eval_transform(large, SIZE, mode)
    assert np.abs(reduced.astype(int) - full.astype(int)).mean() < 3


def test_padding_survives_rotation_and_flip() -> None:
    flipped = replace(AugmentConfig(), flip=True)
    numbers = uniforms(0)
    numbers[8] = 0.0
    data = encode_image(ramps(), "PNG")
    header = read_header(data)
    view = train_image(data, header, SIZE, flipped, numbers, mode="pad")
    np.testing.assert_array_equal(view[:, :, ::-1], eval_transform(ramps(), SIZE, "pad"))

    rotated = replace(AugmentConfig(), affine_degrees=10.0)
    view = train_image(data, header, SIZE, rotated, uniforms(5), mode="pad")
    assert (view[:, 0, SIZE // 2] > 250).all() and (view[:, -1, SIZE // 2] > 250).all()
    assert view[2, SIZE // 2, SIZE // 2] < 230


def test_random_crops_of_augmentation_ignore_the_mode() -> None:
    augment = AugmentConfig(crop_scale=(0.3, 0.9))
    data = encode_image(ramps(), "PNG")
    header = read_header(data)
    expected = train_transform(ramps(), SIZE, augment, uniforms(2))
    for mode in MODES:
        image = train_image(data, header, SIZE, augment, uniforms(2), mode=mode)
        np.testing.assert_array_equal(image, expected)
