"""Image files: thumbnails and data URIs."""

from __future__ import annotations

import base64

import cv2
import numpy as np

from data_pipeline.content.image import composite, decode_image, eval_transform
from data_pipeline.sample_settings import ImageMode


def thumbnail(data: bytes, side: int, mode: ImageMode | None = None) -> np.ndarray:
    """The image on white, its longer side scaled to `side` pixels: uint8 RGB `[height, width, 3]`.

    Args:
        data: The file.
        side: Pixels.
        mode: Show the square that becomes the model's input in this `data.image_mode`.

    Raises:
        DataError: The image cannot be decoded (slug `corrupt-image`).
    """
    if mode is not None:
        return eval_transform(decode_image(data), side, mode).transpose(1, 2, 0)
    pixels = decode_image(data, min_size=(side, side))
    if pixels.shape[2] == 4:
        pixels = composite(pixels, (255, 255, 255))

    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    small: np.ndarray = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=method)
    return small


def data_uri(pixels: np.ndarray) -> str:
    """RGB pixels as a JPEG data URI: `data:image/jpeg;base64,...`."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 82])[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
