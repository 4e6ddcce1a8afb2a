"""Which part of a picture the model sees: drawn from its size alone, before it is decoded.

Shapes: s the model's side. What is cut out and how large decides how many pixels are needed, and so
whether a picture may be decoded at a half, a quarter or an eighth of its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from data_pipeline.settings import AugmentConfig

GEOMETRY_DRAWS = 12
"""Numbers that `train_view` and the choice of a background take."""
_SPARE = 1.7
"""A picture is decoded reduced only if so many pixels a side are left for each of the model's: the
mean of squares and then of areas is close to the mean of areas (37 to 45 dB) only where the second
step still shrinks well: by more than the filter for turned pictures can do alone."""


class View(NamedTuple):
    """A part of a picture, and what is done with it; the part's edges may lie between pixels."""

    left: float
    top: float
    width: float
    height: float
    """The part, in pixels of the whole picture."""
    flip: bool = False
    """Mirrored left-right."""
    turn: float = 0.0
    """Radians."""
    zoom: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    """To the right and down, as a share of the model's side."""

    @property
    def is_upright(self) -> bool:
        """Whether cutting out, resizing and mirroring is all there is to do."""
        return self.zoom == 1.0 and self.turn == 0.0 and self.shift == (0.0, 0.0)

    def scaled(self, x: float, y: float) -> View:
        """The same view of a picture whose width and height were multiplied by `x` and `y`."""
        return self._replace(
            left=self.left * x, top=self.top * y, width=self.width * x, height=self.height * y
        )


def central_view(width: int, height: int) -> View:
    """The central square of a picture."""
    side = min(width, height)
    return View((width - side) // 2, (height - side) // 2, side, side)


def train_view(width: int, height: int, augment: AugmentConfig, draws: Sequence[float]) -> View:
    """A random view of a picture; see `train_transform`."""
    left, top, box_width, box_height = _random_box(width, height, augment, draws[4:8])
    # One draw makes both shifts: its high and its low half.
    reach = augment.affine_translate
    shift = (
        (reach * (2 * draws[11] - 1), reach * (2 * (draws[11] * 4096 % 1) - 1))
        if reach
        else (0.0, 0.0)
    )
    return View(
        left,
        top,
        box_width,
        box_height,
        flip=augment.flip and draws[8] < 0.5,
        turn=math.radians(augment.affine_degrees * (2 * draws[9] - 1)),
        zoom=_between(augment.affine_scale, draws[10]),
        shift=shift,
    )


def least_pixels(view: View, width: int, height: int, size: int) -> tuple[int, int] | None:
    """Height and width at which a picture may be decoded for this view, or None if only all will
    do.

    Args:
        view: Of the whole picture.
        width: Of the whole picture, pixels.
        height: Likewise.
        size: The model's side s, pixels.
    """
    share = _SPARE * size * view.zoom / min(view.width, view.height)
    return (math.ceil(height * share), math.ceil(width * share)) if share <= 0.5 else None


def reduced_view(view: View, reduced: int, width: int, height: int) -> View:
    """A view of a picture that was decoded at `1 / reduced` of its size.

    The part that is cut out has its edges where whole pixels of the smaller picture begin: within
    `reduced / 2` pixels of where they were (less than a third of one of the model's pixels), or a
    little more at the right and the lower border, where the last pixels may be averages with what
    is no picture.

    Args:
        view: In pixels of the whole picture.
        reduced: 2, 4 or 8.
        width: Of the whole picture, pixels.
        height: Likewise.
    """
    view = view.scaled(1 / reduced, 1 / reduced)
    if not view.is_upright:
        return view
    left, top = round(view.left), round(view.top)
    right = min(width // reduced, round(view.left + view.width))
    bottom = min(height // reduced, round(view.top + view.height))
    return view._replace(left=left, top=top, width=right - left, height=bottom - top)


def _random_box(
    width: int, height: int, augment: AugmentConfig, draws: Sequence[float]
) -> tuple[float, float, float, float]:
    """A crop of random area, shape and place; the central square if no random crop is asked for."""
    if augment.crop_scale == (1.0, 1.0):
        return central_view(width, height)[:4]
    area = width * height * _between(augment.crop_scale, draws[0])
    low, high = augment.crop_ratio
    ratio = math.exp(_between((math.log(low), math.log(high)), draws[1]))
    # A crop that would stick out is cut to the picture, which keeps the number of draws the same.
    box_width = max(1.0, min(float(width), math.sqrt(area * ratio)))
    box_height = max(1.0, min(float(height), math.sqrt(area / ratio)))
    return draws[2] * (width - box_width), draws[3] * (height - box_height), box_width, box_height


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw
