"""Color jitter: brightness, contrast, saturation and hue, changed at random in one step.

Each of the four is a linear change of a pixel's color, so all of them together are one 3 x 4
matrix, and a picture is rounded and clipped to 0..255 once instead of four times. The hue is a
rotation about the axis of greys: colors turn, and how light a pixel is stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipeline.settings import AugmentConfig

GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])
"""How light red, green and blue are (ITU-R BT.601, as in JPEG)."""

_TO_YUV = np.array([GRAY_WEIGHTS, [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
"""RGB to lightness and two axes of color (JFIF's YCbCr without its offset)."""
_FROM_YUV = np.linalg.inv(_TO_YUV)
_GRAYS = np.tile(GRAY_WEIGHTS, (3, 1))
"""Every color to its gray."""
_ALONG = _FROM_YUV @ np.diag([0.0, 1.0, 1.0]) @ _TO_YUV
_ACROSS = _FROM_YUV @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _TO_YUV
"""A turn of the colors is `_GRAYS + cos * _ALONG + sin * _ACROSS`."""


def is_on(augment: AugmentConfig) -> bool:
    """Whether any color is changed at all."""
    return bool(augment.brightness or augment.contrast or augment.saturation or augment.hue)


def jitter(square: np.ndarray, augment: AugmentConfig, draws: Sequence[float]) -> np.ndarray:
    """Change the colors of a picture.

    Args:
        square: uint8 RGB `[h, w, 3]`.
        augment: How much may be changed.
        draws: Four numbers in `[0, 1)`: for brightness, contrast, saturation and hue.

    Returns:
        uint8 RGB `[h, w, 3]`.
    """
    matrix_34 = color_matrix(cv2.mean(square)[:3], augment, draws)
    changed: np.ndarray = cv2.transform(square, matrix_34)
    return changed


def color_matrix(
    mean: Sequence[float], augment: AugmentConfig, draws: Sequence[float]
) -> np.ndarray:
    """What is done to every pixel `(r, g, b, 1)`: float64 `[3, 4]`.

    Args:
        mean: The picture's mean red, green and blue, 0..255.
        augment: How much may be changed.
        draws: As for `jitter`.
    """
    brightness, contrast, saturation = (
        1 + reach * (2 * draw - 1)
        for reach, draw in zip(
            (augment.brightness, augment.contrast, augment.saturation), draws, strict=False
        )
    )
    angle = 2 * math.pi * augment.hue * (2 * draws[3] - 1)
    # Contrast is about the mean gray. Greys stay as they are when colors turn, and when they are
    # mixed with greys; so what those two do is only to the color beside the gray.
    light = GRAY_WEIGHTS[0] * mean[0] + GRAY_WEIGHTS[1] * mean[1] + GRAY_WEIGHTS[2] * mean[2]
    matrix = np.empty((3, 4))
    color = saturation * math.cos(angle) * _ALONG + saturation * math.sin(angle) * _ACROSS
    matrix[:, :3] = brightness * contrast * (_GRAYS + color)
    matrix[:, 3] = (1 - contrast) * brightness * light
    return matrix
