"""Synthetic photographs for tests of deduplication."""

from __future__ import annotations

import cv2
import numpy as np


def photo(seed: int, side: int = 200) -> np.ndarray:
    """uint8 `[side, side, 3]` with coarse and fine structure; seeds give distinct images."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(
        rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """Pixels as a JPEG file."""
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])
