"""64-bit perceptual image hash (pHash), stable under resizing, recompression and retouching.

DCT-based: the image in gray at 32 x 32 pixels, its 8 x 8 lowest-frequency DCT coefficients, and one
bit per coefficient for whether it exceeds their median. The Hamming distance of two hashes measures
how different the images look; for unrelated images it is about 32.

Source: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions".
"""

from __future__ import annotations

import cv2
import numpy as np

from data_pipeline.content.image import decode_image

_SIDE, _FREQUENCIES = 32, 8
_MIN_STD = 2.0
"""Standard deviation (of 0..255) below which an image counts as uniform."""
_BIT_VALUES = (np.uint64(1) << np.arange(64, dtype=np.uint64)).astype(np.uint64)


def perceptual_hash(data: bytes) -> int | None:
    """The hash of an image file; None for a uniform image, as those would all be equal.

    Raises:
        DataError: The image cannot be decoded (slug `corrupt-image`).
    """
    # Decoding a JPEG at 1/8 scale is much faster and still larger than 32 x 32.
    pixels = decode_image(data, min_size=(2 * _SIDE, 2 * _SIDE))
    return hash_of_pixels(pixels)


def hash_of_pixels(pixels: np.ndarray) -> int | None:
    """The hash of uint8 `[height, width, 3 or 4]`; transparent areas count as white."""
    if pixels.shape[2] == 4:
        small = cv2.resize(pixels.astype(np.float32), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        alpha = small[..., 3:] / 255
        rgb = small[..., :3] * alpha + 255 * (1 - alpha)
    else:
        rgb = cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)

    gray = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    if gray.std() < _MIN_STD:
        return None

    coefficients = cv2.dct(np.ascontiguousarray(gray))[:_FREQUENCIES, :_FREQUENCIES].reshape(-1)
    # The DC coefficient (mean brightness) is far above all others and does not describe shape.
    bits = coefficients > np.median(coefficients[1:])
    return int((_BIT_VALUES * bits).sum(dtype=np.uint64))
