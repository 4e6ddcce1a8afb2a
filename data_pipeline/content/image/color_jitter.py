"""Color jitter: random brightness, contrast, saturation and hue in one operation.

Each of the four is an affine map of a pixel's color, so their composition is one 3 x 4 matrix, and
an image is rounded and clipped to 0..255 once instead of four times. The hue is a rotation in the
chroma plane: it changes colors but neither grays nor luminance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipeline.settings import AugmentConfig

GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])
"""Luminance of red, green and blue (ITU-R BT.601, as in JPEG)."""

_TO_YUV = np.array([GRAY_WEIGHTS, [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
"""RGB to luminance and two chroma axes (JFIF's YCbCr without its offset)."""
_FROM_YUV = np.linalg.inv(_TO_YUV)
_TO_GRAY = np.tile(GRAY_WEIGHTS, (3, 1))
"""Projects a color on its gray."""
_COS_TERM = _FROM_YUV @ np.diag([0.0, 1.0, 1.0]) @ _TO_YUV
_SIN_TERM = _FROM_YUV @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _TO_YUV
"""A rotation of the hue is `_TO_GRAY + cos * _COS_TERM + sin * _SIN_TERM`."""


def color_jitter_enabled(augment: AugmentConfig) -> bool:
    """Whether the settings change any color."""
    return bool(augment.brightness or augment.contrast or augment.saturation or augment.hue)


def apply_color_jitter(
    image: np.ndarray, augment: AugmentConfig, uniforms: Sequence[float]
) -> np.ndarray:
    """Change the colors of an image.

    Args:
        image: uint8 RGB `[h, w, 3]`.
        augment: Ranges of the changes.
        uniforms: Four numbers in `[0, 1)`: for brightness, contrast, saturation and hue.

    Returns:
        uint8 RGB `[h, w, 3]`.
    """
    matrix_34 = color_matrix(cv2.mean(image)[:3], augment, uniforms)
    jittered: np.ndarray = cv2.transform(image, matrix_34)
    return jittered


def color_matrix(
    mean: Sequence[float], augment: AugmentConfig, uniforms: Sequence[float]
) -> np.ndarray:
    """Matrix that is applied to each pixel `(r, g, b, 1)`: float64 `[3, 4]`.

    Args:
        mean: The image's mean red, green and blue, 0..255.
        augment: Ranges of the changes.
        uniforms: As for `apply_color_jitter`.
    """
    limits = (augment.brightness, augment.contrast, augment.saturation)
    brightness, contrast, saturation = (
        1 + limit * (2 * uniform - 1) for limit, uniform in zip(limits, uniforms, strict=False)
    )
    angle = 2 * math.pi * augment.hue * (2 * uniforms[3] - 1)

    # Contrast is relative to the mean gray. Saturation and hue leave grays unchanged, so they act
    # only on the chroma part of the matrix.
    luminance = GRAY_WEIGHTS[0] * mean[0] + GRAY_WEIGHTS[1] * mean[1] + GRAY_WEIGHTS[2] * mean[2]
    matrix = np.empty((3, 4))
    chroma = saturation * math.cos(angle) * _COS_TERM + saturation * math.sin(angle) * _SIN_TERM
    matrix[:, :3] = brightness * contrast * (_TO_GRAY + chroma)
    matrix[:, 3] = (1 - contrast) * brightness * luminance
    return matrix
