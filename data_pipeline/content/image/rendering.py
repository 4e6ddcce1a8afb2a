"""Renders a view of an image: crop, rotate, translate, zoom, flip and resize in one operation.

Shapes: h, w size of the stored image; s side of the model's input. All geometric operations are
composed into one affine map, so an image is resampled once. Transparent images are composited on a
background first: resampling straight alpha would mix in the color of transparent pixels and leave
dark edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipeline.content.image.views import View
from data_pipeline.settings import AugmentConfig

WHITE = (255, 255, 255)
_MAX_LINEAR_SHRINK = 1.6
"""A linear filter reads two pixels per side; shrinking by more than this would skip pixels."""
_MAX_INTERPOLATED_SHRINK = 1.25
"""Up to this shrink factor, linear interpolation is as close to a bicubic filter as area averaging,
at a fifth of the cost."""
_MIN_BACKGROUND_CONTRAST = 96.0
"""Minimum distance (sum over three channels) between a random background and the image's mean."""
_COMPOSITE_ROWS = 64
"""Rows that are composited at a time, to keep the buffers of a large image small."""


def random_background_color(
    image: np.ndarray, augment: AugmentConfig, uniforms: Sequence[float]
) -> tuple[int, int, int]:
    """Background of an image: a random color for half of the transparent images, else white."""
    if image.shape[2] == 4 and augment.random_background and uniforms[0] < 0.5:
        return _contrasting_color(image, uniforms[1:4])
    return WHITE


def render(
    image: np.ndarray, view: View, size: int, *, background: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """Apply a view to an image.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        view: In pixels of this image.
        size: The model's side s, pixels.
        background: Background color of a transparent image.

    Returns:
        uint8 RGB `[s, s, 3]`; may be non-contiguous and may share memory with `image`.
    """
    if not view.is_axis_aligned:
        return _render_affine(image, view, size, background)
    is_padded = view.exceeds(image.shape[1], image.shape[0])
    region = image if is_padded else _crop(image, view)
    if image.shape[2] == 4:
        region = composite(region, background)
    if is_padded:
        return _render_padded(region, view, size, background)
    region = _resize(region, size)
    return cv2.flip(region, 1) if view.flip else region


def hwc_to_chw(square: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Channels first: uint8 `[s, s, 3]` to a contiguous `[3, s, s]`, written to `out` if given.

    Raises:
        ValueError: `out` has another shape or dtype, or is not contiguous.
    """
    shape = (3, *square.shape[:2])
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, expected contiguous uint8 {list(shape)}"
        )
    # Three to eight times as fast as a transposed copy.
    cv2.split(square, [out[0], out[1], out[2]])
    return out


def composite(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Composite an image on a color: uint8 RGBA `[h, w, 4]` to RGB `[h, w, 3]`."""
    blended = np.empty((*image.shape[:2], 3), np.uint8)
    color = np.array(background, np.uint16)
    for top in range(0, image.shape[0], _COMPOSITE_ROWS):
        rows = image[top : top + _COMPOSITE_ROWS]
        alpha = rows[..., 3:].astype(np.uint16)
        # At most 255 * 255 + 127, which fits 16 bits; adding 127 rounds the division.
        sums = rows[..., :3] * alpha + color * (255 - alpha) + np.uint16(127)
        blended[top : top + _COMPOSITE_ROWS] = sums // np.uint16(255)
    return blended


def _render_affine(
    image: np.ndarray, view: View, size: int, background: tuple[int, int, int]
) -> np.ndarray:
    has_background = image.shape[2] == 4 or view.exceeds(image.shape[1], image.shape[0])
    if image.shape[2] == 4:
        image = composite(image, background)

    # Matrix [[a, b], [c, d]] from the region to the output.
    flip = -1.0 if view.flip else 1.0
    scale_x, scale_y = view.zoom * size / view.width, view.zoom * size / view.height
    a, b = flip * math.cos(view.rotation) * scale_x, -flip * math.sin(view.rotation) * scale_y
    c, d = math.sin(view.rotation) * scale_x, math.cos(view.rotation) * scale_y

    shrink = 1 / min(scale_x, scale_y)
    if shrink > _MAX_LINEAR_SHRINK:
        image, view, factor_x, factor_y = _shrink(image, view, shrink)
        a, b, c, d = a / factor_x, b / factor_y, c / factor_x, d / factor_y

    # The center of pixel i is at i + 0.5, in the input and in the output.
    out_x, out_y = size / 2 + view.shift[0] * size, size / 2 + view.shift[1] * size
    in_x, in_y = view.left + view.width / 2, view.top + view.height / 2
    map_23 = np.array(
        [
            [a, b, out_x - 0.5 - a * (in_x - 0.5) - b * (in_y - 0.5)],
            [c, d, out_y - 0.5 - c * (in_x - 0.5) - d * (in_y - 0.5)],
        ]
    )
    warped: np.ndarray = cv2.warpAffine(
        image,
        map_23,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT if has_background else cv2.BORDER_REFLECT_101,
        borderValue=background,
    )
    return warped


def _render_padded(
    image: np.ndarray, view: View, size: int, background: tuple[int, int, int]
) -> np.ndarray:
    """The whole RGB image in the middle of a square of background."""
    height, width = image.shape[:2]
    inner_width = min(size, max(1, round(size * width / view.width)))
    inner_height = min(size, max(1, round(size * height / view.height)))
    method = cv2.INTER_AREA if max(width, height) > size else cv2.INTER_LINEAR
    inner = cv2.resize(image, (inner_width, inner_height), interpolation=method)
    square = np.full((size, size, 3), background, np.uint8)
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    square[top : top + inner_height, left : left + inner_width] = inner
    return cv2.flip(square, 1) if view.flip else square


def _contrasting_color(image: np.ndarray, uniforms: Sequence[float]) -> tuple[int, int, int]:
    """A random color with enough contrast: a black icon is not placed on near-black."""
    color = [int(256 * uniform) for uniform in uniforms]
    mean = cv2.mean(image, mask=cv2.extractChannel(image, 3))[:3]
    distance = sum(abs(c - m) for c, m in zip(color, mean, strict=True))
    if distance < _MIN_BACKGROUND_CONTRAST:
        color = [(c + 128) % 256 for c in color]
    return color[0], color[1], color[2]


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize to `size` x `size`: halve repeatedly, then average or interpolate the rest.

    Averaging by exactly two is much faster than by a fractional factor.
    """
    while min(image.shape[:2]) >= 2 * size:
        rows, columns = image.shape[0] // 2, image.shape[1] // 2
        image = cv2.resize(
            image[: 2 * rows, : 2 * columns], (columns, rows), interpolation=cv2.INTER_AREA
        )
    if image.shape[:2] == (size, size):
        return image
    average = (
        min(image.shape[:2]) >= size and max(image.shape[:2]) > _MAX_INTERPOLATED_SHRINK * size
    )
    resized: np.ndarray = cv2.resize(
        image, (size, size), interpolation=cv2.INTER_AREA if average else cv2.INTER_LINEAR
    )
    return resized


def _crop(image: np.ndarray, view: View) -> np.ndarray:
    """The region of a view, rounded to whole pixels."""
    left, top = round(view.left), round(view.top)
    right = min(image.shape[1], max(left + 1, round(view.left + view.width)))
    bottom = min(image.shape[0], max(top + 1, round(view.top + view.height)))
    return image[top:bottom, left:right]


def _shrink(image: np.ndarray, view: View, shrink: float) -> tuple[np.ndarray, View, float, float]:
    """Average a large image down until a linear filter can do the rest.

    Returns:
        The smaller image, the view in it, and the factors of its width and height.
    """
    height, width = image.shape[:2]
    smaller = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    factor_x, factor_y = smaller[0] / width, smaller[1] / height
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return image, view.scaled(factor_x, factor_y), factor_x, factor_y
