"""Image decoding: fast for common files, correct for unusual ones.

The size is read from the header and checked before decoding, so a small file cannot exhaust the
memory. JPEG is decoded by simplejpeg, ordinary PNG and WebP by OpenCV. Pillow decodes what those
two get wrong or do not support: CMYK, palettes, 16 bits, animations, and other formats.

A JPEG that is much larger than required is decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled
decoding), which is faster than decoding all pixels.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.content.image.formats import UnreadableImageError, open_with_pillow
from data_pipeline.content.image.header import (
    DECODE_ERRORS,
    ImageHeader,
    corrupt_image_error,
    read_header,
)

MAX_PIXELS = 64 * 2**20
"""Default limit of an image's size: 8192 x 8192, 200 MB as RGB."""
_MAX_SCANS = 32
"""Scans allowed for a progressive JPEG of the maximum size, proportionally more for a smaller one;
10 are usual. A scan of the whole image takes only a few bytes, so a file with thousands of scans
would take hours to decode."""
_STRIP_PIXELS = 1 << 20
"""Pillow images are converted in strips of about this size, to hold at most two copies of a large
image in memory."""


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode an image and apply its EXIF orientation.

    Args:
        data: An image file (`formats.py`); of an animation the first frame is decoded.
        max_pixels: Maximum width x height.
        min_size: Sufficient height and width; see `decode_pixels`.

    Returns:
        uint8 RGB `[height, width, 3]`; or RGBA `[height, width, 4]` with straight (not
        premultiplied) alpha if any pixel is not opaque.

    Raises:
        DataError: Not an image, truncated, corrupt, or too large (slug `corrupt-image`), or of a
            format that cannot be decoded (slug `unsupported-format`).
    """
    header = read_header(data)
    check_pixels(header, max_pixels)
    return decode_pixels(data, header, min_size)[0]


def check_pixels(header: ImageHeader, max_pixels: int) -> None:
    """Reject an image that would take too much memory or time to decode.

    Raises:
        DataError: It is larger than `max_pixels` or has too many scans (slug `corrupt-image`).
    """
    pixels, limit = header.width * header.height, max_pixels // header.memory_factor
    if pixels > limit:
        kind = "" if header.memory_factor == 1 else " for an image of this kind"
        raise corrupt_image_error(
            f"it has {header.width} x {header.height} pixels, more than the limit of "
            f"{limit:,}{kind}"
        )
    if header.scans > _MAX_SCANS and header.scans * pixels > _MAX_SCANS * max_pixels:
        raise corrupt_image_error(
            f"it is a progressive JPEG of {header.scans} scans, too many for its size"
        )


def decode_pixels(
    data: bytes, header: ImageHeader, min_size: tuple[int, int] | None = None
) -> tuple[np.ndarray, int]:
    """Decode an image whose header was already read and checked.

    Args:
        data: The file.
        header: Header of this file.
        min_size: Sufficient height and width; a JPEG that is at least 2, 4 or 8 times as large is
            decoded at 1/2, 1/4 or 1/8 of its size, each pixel being the mean of a block of pixels.
            None decodes all pixels.

    Returns:
        The pixels as in `decode_image`, and the reduction: 1, 2, 4 or 8. An image of `h x w` is
        returned as `ceil(h / reduction) x ceil(w / reduction)`.

    Raises:
        DataError: The image is truncated or corrupt (slug `corrupt-image`).
    """
    reduction = 1
    try:
        if header.decoder == "jpeg":
            reduction = _max_reduction(header, min_size) if min_size else 1
            pixels, reduction = _decode_jpeg(data, header, reduction)
        elif header.decoder == "opencv":
            pixels = _decode_opencv(data)
        else:
            pixels = _decode_pillow(data)
        if header.orientation != 1:
            pixels = _apply_orientation(pixels, header.orientation)
    except (UnreadableImageError, cv2.error, *DECODE_ERRORS) as error:
        raise corrupt_image_error(error) from error

    if pixels.shape[:2] != (-(-header.height // reduction), -(-header.width // reduction)):
        raise corrupt_image_error(
            f"it decodes to {pixels.shape[1]} x {pixels.shape[0]} pixels, but its header gives "
            f"{header.width} x {header.height}"
        )
    return pixels, reduction


def _max_reduction(header: ImageHeader, min_size: tuple[int, int]) -> int:
    min_height, min_width = min_size
    for reduction in (8, 4, 2):
        sufficient = (
            header.height >= reduction * min_height and header.width >= reduction * min_width
        )
        # If the size is not divisible, the last row or column averages pixels beyond the border.
        # An orientation would make it the first one and shift all other pixels.
        divisible = header.height % reduction == 0 and header.width % reduction == 0
        if sufficient and (divisible or header.orientation == 1):
            return reduction
    return 1


def _decode_jpeg(data: bytes, header: ImageHeader, reduction: int) -> tuple[np.ndarray, int]:
    pixels: np.ndarray
    try:
        if reduction == 1:
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        else:
            # libjpeg selects the smallest of its sizes that is not below these.
            height, width = -(-header.height // reduction), -(-header.width // reduction)
            if header.orientation >= 5:
                height, width = width, height
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="RGB", min_height=height, min_width=width
            )
    except ValueError:
        # simplejpeg rejects any deviation from the standard; Pillow only missing data.
        return _decode_pillow(data), 1
    return pixels, reduction


def _decode_opencv(data: bytes) -> np.ndarray:
    """Decode 8-bit RGB or RGBA; OpenCV returns BGR."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.dtype != np.uint8:
        raise UnreadableImageError("its data are corrupt")
    if image.shape[2] == 3:
        conversion = cv2.COLOR_BGR2RGB
    elif cv2.minMaxLoc(cv2.extractChannel(image, 3))[0] == 255:
        conversion = cv2.COLOR_BGRA2RGB
    else:
        conversion = cv2.COLOR_BGRA2RGBA
    pixels: np.ndarray = cv2.cvtColor(image, conversion)
    return pixels


def _decode_pillow(data: bytes) -> np.ndarray:
    """Decode any format of Pillow to RGB or RGBA, without applying the orientation."""
    with open_with_pillow(data) as image:
        image.load()
        return pillow_pixels(image)


def pillow_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image of any mode, uint8 RGB or RGBA `[h, w, 3 or 4]`.

    The orientation is not applied; an image without transparent pixels becomes RGB.
    """
    scale = _grayscale_factor(image)
    mode = "RGBA" if image.has_transparency_data and scale is None else "RGB"
    pixels = np.empty((image.height, image.width, len(mode)), np.uint8)

    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip: Any = image.crop((0, top, image.width, min(image.height, top + rows)))
        if scale is not None:
            gray = np.asarray(strip, np.float64) * scale
            strip = Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))
        pixels[top : top + rows] = np.asarray(strip.convert(mode))

    if len(mode) == 4 and cv2.minMaxLoc(cv2.extractChannel(pixels, 3))[0] == 255:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
    return pixels


def _grayscale_factor(image: Any) -> float | None:
    """Factor that maps grayscale of more than 8 bits to 0..255 (Pillow would clip it); None for
    other images."""
    if image.mode.startswith("I;16"):
        return 1 / 257
    if image.mode in ("I", "F"):
        is_deep = image.format == "PPM" or image.getextrema()[1] > 255
        return 1 / 257 if is_deep else 1.0
    return None


def _apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, as Pillow's `exif_transpose` does."""
    oriented: np.ndarray
    match orientation:
        case 2:
            oriented = cv2.flip(pixels, 1)
        case 3:
            oriented = cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            oriented = cv2.flip(pixels, 0)
        case 5:
            oriented = cv2.transpose(pixels)
        case 6:
            oriented = cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            oriented = cv2.flip(cv2.transpose(pixels), -1)
        case _:
            oriented = cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return oriented
