"""Pixels as they are stored to pixels as the model sees them.

Shapes: h, w as stored; s the model's side. Everything geometric (crop, turn, shift, zoom, mirror,
resize) is one affine map, so a picture is resampled once. Transparency is put on its background
before that: resampling straight alpha would mix in the color that see-through pixels happen to
hold, and leave dark rims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipeline.content.colors import jitter
from data_pipeline.content.views import View, central_view, train_view
from data_pipeline.settings import AugmentConfig

COLOR_DRAWS = 4
"""Numbers that the color jitter takes."""
WHITE = (255, 255, 255)
_LINEAR_SHRINK = 1.6
"""A linear filter looks at two pixels a side; shrinking by more than this would skip some."""
_NEARLY = 1.25
"""Up to this shrink, interpolating comes as near to a bicubic filter as averaging does, at a fifth
of the cost."""
_MIN_CONTRAST = 96.0
"""Least distance (sum of three channels) of a random background from the picture's mean color."""
_ROWS = 64
"""Rows that are put on a background at a time, so that a large picture needs no large buffers."""


def train_transform(
    image: np.ndarray,
    size: int,
    augment: AugmentConfig,
    draws: Sequence[float],
    colors: Sequence[float] = (),
) -> np.ndarray:
    """Change a picture at random, as the settings allow.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        size: The model's side s, pixels.
        augment: What may be changed, and how much.
        draws: The sample's own random numbers in `[0, 1)`, `GEOMETRY_DRAWS` of them. Each has one
            meaning, whatever the settings.
        colors: `COLOR_DRAWS` more for the color jitter; none leaves colors as they are.

    Returns:
        uint8 `[3, s, s]`. Where a turned or shifted picture leaves a corner empty there is its
        background, or its mirror image if it has no transparency.
    """
    view = train_view(image.shape[1], image.shape[0], augment, draws)
    square = render(image, view, size, background=train_background(image, augment, draws))
    return planes(jitter(square, augment, colors) if colors else square)


def eval_transform(image: np.ndarray, size: int) -> np.ndarray:
    """The picture's central square on white, made `size` pixels wide.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        size: The model's side s, pixels.

    Returns:
        uint8 `[3, s, s]`.
    """
    return planes(render(image, central_view(image.shape[1], image.shape[0]), size))


def train_background(
    image: np.ndarray, augment: AugmentConfig, draws: Sequence[float]
) -> tuple[int, int, int]:
    """The color that goes behind a picture: white, or for half of those with transparency a random
    one."""
    if image.shape[2] == 4 and augment.random_background and draws[0] < 0.5:
        return _random_background(image, draws[1:4])
    return WHITE


def render(
    image: np.ndarray, view: View, size: int, *, background: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """A view of a picture as the model's square.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        view: In this picture's pixels.
        size: The model's side s, pixels.
        background: Color behind a picture with transparency.

    Returns:
        uint8 RGB `[s, s, 3]`; not always contiguous, and may share `image`'s memory.
    """
    if not view.is_upright:
        return _render_affine(image, view, size, background)
    part = _cut(image, view)
    if image.shape[2] == 4:
        part = composite(part, background)
    part = _resize(part, size)
    return cv2.flip(part, 1) if view.flip else part


def planes(square: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Channels first: uint8 `[s, s, 3]` to a contiguous `[3, s, s]`, into `out` if that is given.

    Raises:
        ValueError: `out` has another shape or type, or is not contiguous.
    """
    shape = (3, *square.shape[:2])
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, not contiguous uint8 {list(shape)}"
        )
    # Three to eight times as quick as a transposed copy.
    cv2.split(square, [out[0], out[1], out[2]])
    return out


def composite(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Put a picture on a color: uint8 RGBA `[h, w, 4]` to RGB `[h, w, 3]`."""
    mixed = np.empty((*image.shape[:2], 3), np.uint8)
    color = np.array(background, np.uint16)
    for top in range(0, image.shape[0], _ROWS):
        rows = image[top : top + _ROWS]
        alpha = rows[..., 3:].astype(np.uint16)
        # At most 255 * 255 + 127 fits 16 bits; adding 127 rounds the division.
        sums = rows[..., :3] * alpha + color * (255 - alpha) + np.uint16(127)
        mixed[top : top + _ROWS] = sums // np.uint16(255)
    return mixed


def _render_affine(
    image: np.ndarray, view: View, size: int, background: tuple[int, int, int]
) -> np.ndarray:
    see_through = image.shape[2] == 4
    if see_through:
        image = composite(image, background)
    mirrored = -1.0 if view.flip else 1.0
    # Columns: where a step to the right, and one down, in the box leads in the result.
    scale_x, scale_y = view.zoom * size / view.width, view.zoom * size / view.height
    a, b = mirrored * math.cos(view.turn) * scale_x, -mirrored * math.sin(view.turn) * scale_y
    c, d = math.sin(view.turn) * scale_x, math.cos(view.turn) * scale_y
    center = (size / 2 + view.shift[0] * size, size / 2 + view.shift[1] * size)
    shrink = 1 / min(scale_x, scale_y)
    if shrink > _LINEAR_SHRINK:
        image, view, factor_x, factor_y = _shrink(image, view, shrink)
        a, b, c, d = a / factor_x, b / factor_y, c / factor_x, d / factor_y
    middle_x, middle_y = view.left + view.width / 2, view.top + view.height / 2
    # Pixel i covers [i, i + 1): its center is i + 0.5, both where it comes from and where it goes.
    map_23 = np.array(
        [
            [a, b, center[0] - 0.5 - a * (middle_x - 0.5) - b * (middle_y - 0.5)],
            [c, d, center[1] - 0.5 - c * (middle_x - 0.5) - d * (middle_y - 0.5)],
        ]
    )
    border = cv2.BORDER_CONSTANT if see_through else cv2.BORDER_REFLECT_101
    warped: np.ndarray = cv2.warpAffine(
        image,
        map_23,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=border,
        borderValue=background,
    )
    return warped


def _random_background(image: np.ndarray, draws: Sequence[float]) -> tuple[int, int, int]:
    """A color against which the picture can be seen: a black icon is never put on near-black."""
    color = [int(256 * draw) for draw in draws]
    mean = cv2.mean(image, mask=cv2.extractChannel(image, 3))[:3]
    if sum(abs(c - m) for c, m in zip(color, mean, strict=True)) < _MIN_CONTRAST:
        color = [(c + 128) % 256 for c in color]
    return color[0], color[1], color[2]


def _resize(part: np.ndarray, size: int) -> np.ndarray:
    """A picture made `size` x `size`: halved as often as it can be, then averaged or interpolated
    the rest.

    Averaging by exactly two is many times as fast as by a fraction, and what is left is small.
    """
    while min(part.shape[:2]) >= 2 * size:
        rows, columns = part.shape[0] // 2, part.shape[1] // 2
        part = cv2.resize(
            part[: 2 * rows, : 2 * columns], (columns, rows), interpolation=cv2.INTER_AREA
        )
    if part.shape[:2] == (size, size):
        return part
    averages = min(part.shape[:2]) >= size and max(part.shape[:2]) > _NEARLY * size
    resized: np.ndarray = cv2.resize(
        part, (size, size), interpolation=cv2.INTER_AREA if averages else cv2.INTER_LINEAR
    )
    return resized


def _cut(image: np.ndarray, view: View) -> np.ndarray:
    """The part of a view, to whole pixels."""
    left, top = round(view.left), round(view.top)
    right = min(image.shape[1], max(left + 1, round(view.left + view.width)))
    bottom = min(image.shape[0], max(top + 1, round(view.top + view.height)))
    return image[top:bottom, left:right]


def _shrink(image: np.ndarray, view: View, shrink: float) -> tuple[np.ndarray, View, float, float]:
    """Average a large picture down, so that what is left to shrink suits a linear filter.

    Returns:
        The smaller picture, the view in it, and by what its width and height were multiplied.
    """
    height, width = image.shape[:2]
    smaller = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    factor_x, factor_y = smaller[0] / width, smaller[1] / height
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return image, view.scaled(factor_x, factor_y), factor_x, factor_y
