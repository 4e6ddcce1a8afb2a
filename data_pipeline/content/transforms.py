"""Pixels as they are stored to pixels as the model sees them.

Shapes: h, w as stored; s the model's side. Everything geometric (crop, turn, shift, zoom, mirror,
resize) is one affine map, so a picture is resampled once. Transparency is put on its background
before that: resampling straight alpha would mix in the colour that see-through pixels happen to
hold, and leave dark rims.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from data_pipeline.settings import AugmentConfig

WHITE = (255, 255, 255)
_LINEAR_SHRINK = 1.6
"""A linear filter looks at two pixels a side; shrinking by more than this would skip some."""
_MIN_CONTRAST = 96.0
"""Least distance (sum of three channels) of a random background from the picture's mean colour."""


class _Box(NamedTuple):
    """A part of a picture in pixels; edges may lie between pixels."""

    left: float
    top: float
    width: float
    height: float


def train_transform(
    image: np.ndarray, size: int, augment: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Change a picture at random, as the settings allow.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        size: The model's side s, pixels.
        augment: What may be changed, and how much.
        rng: The sample's own generator; always the same number of draws is taken.

    Returns:
        uint8 `[3, s, s]`. Where a turned or shifted picture leaves a corner empty there is its
        background, or its mirror image if it has no transparency.
    """
    draws = [float(draw) for draw in rng.random(12)]
    height, width = image.shape[:2]
    see_through = image.shape[2] == 4
    background = WHITE
    if see_through and augment.random_background and draws[0] < 0.5:
        background = _random_background(image, draws[1:4])
    box = _random_box(width, height, augment, draws[4:8])
    flip = augment.flip and draws[8] < 0.5
    degrees = augment.affine_degrees * (2 * draws[9] - 1)
    zoom = _between(augment.affine_scale, draws[10])
    # One draw makes both shifts: its high and its low half.
    shift_x, shift_y = (
        augment.affine_translate * (2 * draw - 1) for draw in (draws[11], draws[11] * 4096 % 1)
    )
    if see_through:
        image = composite(image, background)
    if not (degrees or shift_x or shift_y or zoom != 1.0):
        return _channels_first(_resize_box(image, box, size), flip=flip)

    turn = math.radians(degrees)
    mirrored = -1.0 if flip else 1.0
    # Columns: where a step to the right, and one down, in the box leads in the result.
    scale_x, scale_y = zoom * size / box.width, zoom * size / box.height
    a, b = mirrored * math.cos(turn) * scale_x, -mirrored * math.sin(turn) * scale_y
    c, d = math.sin(turn) * scale_x, math.cos(turn) * scale_y
    centre = (size / 2 + shift_x * size, size / 2 + shift_y * size)
    shrink = 1 / min(scale_x, scale_y)
    if shrink > _LINEAR_SHRINK:
        image, box, factor_x, factor_y = _shrink(image, box, shrink)
        a, b, c, d = a / factor_x, b / factor_y, c / factor_x, d / factor_y
    middle_x, middle_y = box.left + box.width / 2, box.top + box.height / 2
    # Pixel i covers [i, i + 1): its centre is i + 0.5, both where it comes from and where it goes.
    map_23 = np.array(
        [
            [a, b, centre[0] - 0.5 - a * (middle_x - 0.5) - b * (middle_y - 0.5)],
            [c, d, centre[1] - 0.5 - c * (middle_x - 0.5) - d * (middle_y - 0.5)],
        ]
    )
    border = cv2.BORDER_CONSTANT if see_through else cv2.BORDER_REFLECT_101
    warped = cv2.warpAffine(
        image, map_23, (size, size), flags=cv2.INTER_LINEAR, borderMode=border, borderValue=background
    )
    return _channels_first(warped)


def eval_transform(image: np.ndarray, size: int) -> np.ndarray:
    """The picture's central square on white, made `size` pixels wide.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        size: The model's side s, pixels.

    Returns:
        uint8 `[3, s, s]`.
    """
    if image.shape[2] == 4:
        image = composite(image, WHITE)
    return _channels_first(_resize_box(image, _central_square(image.shape[1], image.shape[0]), size))


def composite(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Put a picture on a colour: uint8 RGBA `[h, w, 4]` to RGB `[h, w, 3]`."""
    alpha = image[..., 3:].astype(np.uint16)
    colour = np.array(background, np.uint16)
    # At most 255 * 255 + 127 fits 16 bits; adding 127 rounds the division.
    mixed = image[..., :3] * alpha + colour * (255 - alpha) + np.uint16(127)
    return (mixed // np.uint16(255)).astype(np.uint8)


def _random_background(image: np.ndarray, draws: list[float]) -> tuple[int, int, int]:
    """A colour against which the picture can be seen: a black icon is never put on near-black."""
    colour = [int(256 * draw) for draw in draws]
    mean = cv2.mean(image, mask=cv2.extractChannel(image, 3))[:3]
    if sum(abs(c - m) for c, m in zip(colour, mean, strict=True)) < _MIN_CONTRAST:
        colour = [(c + 128) % 256 for c in colour]
    return colour[0], colour[1], colour[2]


def _random_box(width: int, height: int, augment: AugmentConfig, draws: list[float]) -> _Box:
    """A crop of random area, shape and place; the central square if no random crop is asked for."""
    if augment.crop_scale == (1.0, 1.0):
        return _central_square(width, height)
    area = width * height * _between(augment.crop_scale, draws[0])
    low, high = (math.log(ratio) for ratio in augment.crop_ratio)
    ratio = math.exp(_between((low, high), draws[1]))
    # A crop that would stick out is cut to the picture, which keeps the number of draws the same.
    box_width = max(1.0, min(float(width), math.sqrt(area * ratio)))
    box_height = max(1.0, min(float(height), math.sqrt(area / ratio)))
    return _Box(draws[2] * (width - box_width), draws[3] * (height - box_height), box_width, box_height)


def _central_square(width: int, height: int) -> _Box:
    side = min(width, height)
    return _Box((width - side) // 2, (height - side) // 2, side, side)


def _resize_box(image: np.ndarray, box: _Box, size: int) -> np.ndarray:
    """The box, to whole pixels, as `[size, size, 3]`."""
    left, top = round(box.left), round(box.top)
    right = min(image.shape[1], max(left + 1, round(box.left + box.width)))
    bottom = min(image.shape[0], max(top + 1, round(box.top + box.height)))
    part = image[top:bottom, left:right]
    if part.shape[:2] == (size, size):
        return part
    shrinks = part.shape[0] >= size and part.shape[1] >= size
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: np.ndarray = cv2.resize(part, (size, size), interpolation=how)
    return resized


def _shrink(image: np.ndarray, box: _Box, shrink: float) -> tuple[np.ndarray, _Box, float, float]:
    """Average a large picture down, so that what is left to shrink suits a linear filter.

    Returns:
        The smaller picture, the box in it, and by what its width and height were multiplied.
    """
    height, width = image.shape[:2]
    smaller = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    factor_x, factor_y = smaller[0] / width, smaller[1] / height
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    box = _Box(box.left * factor_x, box.top * factor_y, box.width * factor_x, box.height * factor_y)
    return image, box, factor_x, factor_y


def _channels_first(image: np.ndarray, *, flip: bool = False) -> np.ndarray:
    """`[s, s, 3]` to a contiguous `[3, s, s]`, mirrored left-right if asked."""
    return np.ascontiguousarray((image[:, ::-1] if flip else image).transpose(2, 0, 1))


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw
