"""Crop, flip and affine parameters of an image, computed from its size before decoding.

Shapes: s side of the model's input. The region that is cropped and its size determine how many
pixels are needed, and therefore whether a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from data_pipeline.settings import AugmentConfig, ImageMode

NUM_GEOMETRY_UNIFORMS = 12
"""Random numbers used by `random_view` and for the background color."""
_MIN_OVERSAMPLING = 1.7
"""A JPEG is decoded at a reduced size only if that leaves at least this many pixels per pixel of
the model's input, on each side. The result is close to that of decoding at full size (PSNR of 37
to 45 dB) only if resizing still shrinks by more than linear interpolation can do alone (1.6)."""


class View(NamedTuple):
    """A region of an image and the geometric operations on it; its edges may be fractional."""

    left: float
    top: float
    width: float
    height: float
    """The region, in pixels of the whole image."""
    flip: bool = False
    """Flip horizontally."""
    rotation: float = 0.0
    """Radians."""
    zoom: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    """Translation to the right and down, as a fraction of the model's side."""

    @property
    def is_axis_aligned(self) -> bool:
        """Whether cropping, resizing and flipping suffice."""
        return self.zoom == 1.0 and self.rotation == 0.0 and self.shift == (0.0, 0.0)

    def exceeds(self, width: int, height: int) -> bool:
        """Whether the region is larger than an image, whose surroundings are then background."""
        return (
            min(self.left, self.top) < 0
            or self.left + self.width > width + 1
            or self.top + self.height > height + 1
        )

    def scaled(self, x: float, y: float) -> View:
        """The same view of an image whose width and height were multiplied by `x` and `y`."""
        return self._replace(
            left=self.left * x, top=self.top * y, width=self.width * x, height=self.height * y
        )


def mode_view(
    width: int, height: int, mode: ImageMode = "crop", uniforms: Sequence[float] = ()
) -> View:
    """The region of an image that becomes the square input of the model.

    Args:
        width: Width of the image, pixels.
        height: Height of the image, pixels.
        mode: `crop`, the center square; `pad`, the whole image in a larger square; `squash`, the
            whole image; `random_crop`, a square at a random position.
        uniforms: Two numbers in `[0, 1)` for `random_crop`; without them, it is `crop`.
    """
    if mode == "squash":
        return View(0, 0, width, height)
    side = max(width, height) if mode == "pad" else min(width, height)
    if mode == "random_crop" and uniforms:
        return View(
            int(uniforms[0] * (width - side + 1)),
            int(uniforms[1] * (height - side + 1)),
            side,
            side,
        )
    return View((width - side) // 2, (height - side) // 2, side, side)


def random_view(
    width: int,
    height: int,
    augment: AugmentConfig,
    uniforms: Sequence[float],
    mode: ImageMode = "crop",
) -> View:
    """A random view of an image.

    Args:
        width: Width of the image, pixels.
        height: Height of the image, pixels.
        augment: Which operations are allowed, and their ranges.
        uniforms: `NUM_GEOMETRY_UNIFORMS` numbers in `[0, 1)`. Each is used for one operation,
            whatever the settings, so a setting does not change the other operations.
        mode: The region if there are no random crops (`crop_scale` of 1).
    """
    left, top, box_width, box_height = _random_box(width, height, augment, uniforms[4:8], mode)

    shift = (0.0, 0.0)
    if limit := augment.affine_translate:
        # One number gives both translations: from its high and from its low bits.
        low_bits = uniforms[11] * 4096 % 1
        shift = (limit * (2 * uniforms[11] - 1), limit * (2 * low_bits - 1))

    return View(
        left,
        top,
        box_width,
        box_height,
        flip=augment.flip and uniforms[8] < 0.5,
        rotation=math.radians(augment.affine_degrees * (2 * uniforms[9] - 1)),
        zoom=_interpolate(augment.affine_scale, uniforms[10]),
        shift=shift,
    )


def min_decode_size(view: View, width: int, height: int, size: int) -> tuple[int, int] | None:
    """Height and width that suffice for this view, or None if all pixels are needed.

    Args:
        view: View of the whole image.
        width: Width of the whole image, pixels.
        height: Height of the whole image, pixels.
        size: The model's side s, pixels.
    """
    ratio = _MIN_OVERSAMPLING * size * view.zoom / min(view.width, view.height)
    return (math.ceil(height * ratio), math.ceil(width * ratio)) if ratio <= 0.5 else None


def scale_view(view: View, reduction: int, width: int, height: int) -> View:
    """The view for an image that was decoded at `1 / reduction` of its size.

    The edges of a crop are rounded to pixels of the reduced image: they move by at most
    `reduction / 2` pixels (less than a third of a pixel of the model's input). At the right and
    bottom border they may move further, because the last pixels may be averages with pixels beyond
    the border.

    Args:
        view: In pixels of the whole image.
        reduction: 2, 4 or 8.
        width: Width of the whole image, pixels.
        height: Height of the whole image, pixels.
    """
    view = view.scaled(1 / reduction, 1 / reduction)
    if not view.is_axis_aligned:
        return view
    if view.exceeds(width // reduction, height // reduction):
        return view
    left, top = round(view.left), round(view.top)
    right = min(width // reduction, round(view.left + view.width))
    bottom = min(height // reduction, round(view.top + view.height))
    return view._replace(left=left, top=top, width=right - left, height=bottom - top)


def _random_box(
    width: int, height: int, augment: AugmentConfig, uniforms: Sequence[float], mode: ImageMode
) -> tuple[float, float, float, float]:
    """A crop of random area, aspect ratio and position; without random crops, that of the mode."""
    if augment.crop_scale == (1.0, 1.0):
        return mode_view(width, height, mode, uniforms[2:4])[:4]
    area = width * height * _interpolate(augment.crop_scale, uniforms[0])
    low, high = augment.crop_ratio
    ratio = math.exp(_interpolate((math.log(low), math.log(high)), uniforms[1]))
    # A crop that would exceed the image is clipped; resampling would need more random numbers.
    box_width = max(1.0, min(float(width), math.sqrt(area * ratio)))
    box_height = max(1.0, min(float(height), math.sqrt(area / ratio)))
    left, top = uniforms[2] * (width - box_width), uniforms[3] * (height - box_height)
    return left, top, box_width, box_height


def _interpolate(bounds: tuple[float, float], uniform: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform
