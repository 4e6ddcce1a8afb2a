"""A perceptual hash: 64 bits that stay nearly the same when a picture is resized, recompressed or
retouched.

The classic one by cosine transform: the picture in gray at 32 x 32, its 8 x 8 slowest waves, and
one bit each for whether a wave is stronger than their median. The number of bits in which two
hashes differ says how different the pictures look; unrelated ones differ in about 32.

Source: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions".
"""

from __future__ import annotations

import cv2
import numpy as np

from data_pipeline.content.images import decode

_SIDE, _WAVES = 32, 8
_FLAT = 2.0
"""Standard deviation (of 0..255) below which a picture has nothing to be recognized by."""
_WEIGHTS = (np.uint64(1) << np.arange(64, dtype=np.uint64)).astype(np.uint64)


def perceptual_hash(data: bytes) -> int | None:
    """The hash of a picture file; None for one of a single color, which would be like every other
    such.

    Raises:
        DataError: It cannot be decoded (slug `bad-image`).
    """
    # An eighth of a photograph is still larger than 32 x 32, and much quicker to decode.
    pixels = decode(data, at_least=(2 * _SIDE, 2 * _SIDE))
    return hash_of_pixels(pixels)


def hash_of_pixels(pixels: np.ndarray) -> int | None:
    """The hash of uint8 `[height, width, 3 or 4]`; transparent parts are white."""
    if pixels.shape[2] == 4:
        small = cv2.resize(pixels.astype(np.float32), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        alpha = small[..., 3:] / 255
        rgb = small[..., :3] * alpha + 255 * (1 - alpha)
    else:
        rgb = cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    gray = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    if gray.std() < _FLAT:
        return None
    waves = cv2.dct(np.ascontiguousarray(gray))[:_WAVES, :_WAVES].reshape(-1)
    # The mean brightness (wave 0) is far above all others and says nothing about the form.
    bits = waves > np.median(waves[1:])
    return int((_WEIGHTS * bits).sum(dtype=np.uint64))
