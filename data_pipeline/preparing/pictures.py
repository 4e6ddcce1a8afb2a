"""What can be said of a picture without looking at all of it: its kind, and small copies to
show."""

from __future__ import annotations

import base64

import cv2
import numpy as np

from data_pipeline.content.images import decode
from data_pipeline.content.transforms import composite

_BEGINNINGS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"BM", "bmp"),
)


def format_of(data: bytes) -> str:
    """`jpg`, `png`, `webp`, `gif`, `tif` or `bmp` by the file's first bytes; empty for anything
    else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for beginning, kind in _BEGINNINGS if data.startswith(beginning)), "")


def thumbnail(data: bytes, side: int) -> np.ndarray:
    """A small copy on white, uint8 `[height, width, 3]`, RGB; its longer side is `side` pixels.

    Raises:
        DataError: It cannot be decoded (slug `bad-image`).
    """
    pixels = decode(data, at_least=(side, side))
    if pixels.shape[2] == 4:
        pixels = composite(pixels, (255, 255, 255))
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    small: np.ndarray = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=method)
    return small


def data_uri(pixels: np.ndarray) -> str:
    """A picture as part of a page: `data:image/jpeg;base64,...`."""
    coded = cv2.imencode(
        ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82]
    )[1]
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()
