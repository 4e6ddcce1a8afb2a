"""An image as the model's square input: augmented for training, unchanged for evaluation.

Images that are not square are cropped, padded or squashed, see `views.mode_view`.

Shapes: h, w size of the stored image; s side of the model's input. Both start from a file
(`train_image`, `eval_image`) or from decoded pixels (`train_transform`, `eval_transform`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.content.image.color_jitter import apply_color_jitter
from data_pipeline.content.image.decoding import decode_pixels
from data_pipeline.content.image.header import ImageHeader
from data_pipeline.content.image.rendering import hwc_to_chw, random_background_color, render
from data_pipeline.content.image.views import (
    View,
    min_decode_size,
    mode_view,
    random_view,
    scale_view,
)
from data_pipeline.settings import AugmentConfig, ImageMode

NUM_COLOR_UNIFORMS = 4
"""Random numbers used by the color jitter."""


def train_image(
    data: bytes,
    header: ImageHeader,
    size: int,
    augment: AugmentConfig,
    uniforms: Sequence[float],
    *,
    mode: ImageMode = "crop",
    color_uniforms: Sequence[float] = (),
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode and augment an image file; only as many pixels are decoded as its view needs.

    Args:
        data: The file.
        header: Header of this file, already checked.
        size: The model's side s, pixels.
        augment: Which operations are allowed, and their ranges.
        uniforms: As for `train_transform`.
        mode: What becomes of an image that is not square.
        color_uniforms: As for `train_transform`.
        out: Contiguous uint8 `[3, s, s]` that becomes the result; None allocates it.

    Returns:
        uint8 `[3, s, s]`, as `train_transform`.

    Raises:
        DataError: The image is truncated or corrupt (slug `corrupt-image`).
    """
    view = random_view(header.width, header.height, augment, uniforms, mode)
    min_size = min_decode_size(view, header.width, header.height, size)
    pixels, reduction = decode_pixels(data, header, min_size)
    if reduction != 1:
        view = scale_view(view, reduction, header.width, header.height)
    return hwc_to_chw(_augment(pixels, view, size, augment, uniforms, color_uniforms), out)


def train_transform(
    image: np.ndarray,
    size: int,
    augment: AugmentConfig,
    uniforms: Sequence[float],
    color_uniforms: Sequence[float] = (),
) -> np.ndarray:
    """Random augmentation of an image.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        size: The model's side s, pixels.
        augment: Which operations are allowed, and their ranges.
        uniforms: `NUM_GEOMETRY_UNIFORMS` random numbers in `[0, 1)`. Each is used for one
            operation, whatever the settings.
        color_uniforms: `NUM_COLOR_UNIFORMS` numbers for the color jitter; none disables it.

    Returns:
        uint8 `[3, s, s]`. Where a rotation or translation leaves a corner empty, it is filled with
        the background, or with a reflection of the image if it has no transparency.
    """
    view = random_view(image.shape[1], image.shape[0], augment, uniforms)
    return hwc_to_chw(_augment(image, view, size, augment, uniforms, color_uniforms))


def eval_image(
    data: bytes,
    header: ImageHeader,
    size: int,
    mode: ImageMode = "crop",
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode all pixels of an image file; a square, as `eval_transform`.

    Args:
        data: The file.
        header: Header of this file, already checked.
        size: The model's side s, pixels.
        mode: What becomes of an image that is not square; `random_crop` is `crop`.
        out: Contiguous uint8 `[3, s, s]` that becomes the result; None allocates it.

    Raises:
        DataError: The image is truncated or corrupt (slug `corrupt-image`).
    """
    return eval_transform(decode_pixels(data, header)[0], size, mode, out=out)


def eval_transform(
    image: np.ndarray, size: int, mode: ImageMode = "crop", *, out: np.ndarray | None = None
) -> np.ndarray:
    """The image's region on white, resized to a square: its center square, or that of the mode.

    Args:
        image: uint8 RGB `[h, w, 3]` or RGBA `[h, w, 4]`.
        size: The model's side s, pixels.
        mode: What becomes of an image that is not square; `random_crop` is `crop`.
        out: Contiguous uint8 `[3, s, s]` that becomes the result; None allocates it.

    Returns:
        uint8 `[3, s, s]`.
    """
    return hwc_to_chw(render(image, mode_view(image.shape[1], image.shape[0], mode), size), out)


def _augment(
    image: np.ndarray,
    view: View,
    size: int,
    augment: AugmentConfig,
    uniforms: Sequence[float],
    color_uniforms: Sequence[float],
) -> np.ndarray:
    """A view of an image with a random background and colors: uint8 `[s, s, 3]`."""
    background = random_background_color(image, augment, uniforms)
    square = render(image, view, size, background=background)
    return apply_color_jitter(square, augment, color_uniforms) if color_uniforms else square
