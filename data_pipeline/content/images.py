"""Bytes of a picture file to pixels: quickly for the usual files, correctly for the odd ones.

What a file is follows from its first bytes, never from its name. The size is read from the header
and checked before anything is decoded, so a small file cannot ask for all the memory. JPEG goes to
simplejpeg, plain PNG and WebP to OpenCV; what those read wrongly or not at all (turned by EXIF,
CMYK, palettes, 16 bits, animations, GIF, BMP, TIFF) goes to Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.common.errors import DataError

MAX_PIXELS = 64 * 2**20
"""Largest picture that is decoded; 8192 x 8192, 200 MB as RGB."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Others stay out: some of Pillow's plug-ins start other programs.


class _Unreadable(Exception):
    """Why a picture cannot be read; becomes a DataError."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one picture, turned the right way up.

    Args:
        data: A JPEG, PNG, WebP, GIF, BMP or TIFF file; of an animation the first picture is taken.
        max_pixels: Largest width x height that is accepted.

    Returns:
        uint8 `[height, width, 3]`, RGB; or `[height, width, 4]`, RGBA with straight (not multiplied)
        alpha, if any pixel is not opaque.

    Raises:
        DataError: Not a picture, cut off, damaged, or too large (slug `bad-image`).
    """
    try:
        return _decode(data, max_pixels)
    except (
        _Unreadable, ValueError, OSError, SyntaxError, struct.error, cv2.error, EOFError, KeyError,
        IndexError, TypeError, OverflowError, ZeroDivisionError, MemoryError, Image.DecompressionBombError,
    ) as error:  # fmt: skip
        # Decoders fail in all these ways on damaged files; whichever it was, the picture is bad.
        raise DataError(f"the picture cannot be decoded: {error}", slug="bad-image") from error


def _decode(data: bytes, max_pixels: int) -> np.ndarray:
    if data.startswith(b"\xff\xd8\xff"):
        return _decode_jpeg(data, max_pixels)
    if data.startswith(_PNG):
        return _decode_png(data, max_pixels)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _decode_webp(data, max_pixels)
    if data[:4] in (b"GIF8", b"II*\0", b"MM\0*") or data[:2] == b"BM":
        return _decode_odd(data, max_pixels)
    beginning = f"begins with {data[:12]!r}" if data else "is empty"
    raise _Unreadable(f"it {beginning}, which is no JPEG, PNG, WebP, GIF, BMP or TIFF")


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, max_pixels)
    # EXIF lies in the first segments and may say that the camera was held sideways.
    if colours in ("CMYK", "YCCK") or b"Exif\0\0" in data[:4096]:
        return _decode_odd(data, max_pixels)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        # Strict about any oddity; Pillow forgives all but lost data.
        return _decode_odd(data, max_pixels)
    return pixels


def _decode_png(data: bytes, max_pixels: int) -> np.ndarray:
    kinds = _png_chunks(data)
    width, height, depth, colour_type = struct.unpack(">IIBB", data[16:26])
    _check_size(width, height, max_pixels)
    plain = depth == 8 and colour_type in (2, 6) and not kinds & {b"tRNS", b"eXIf", b"acTL"}
    return _decode_opencv(data) if plain else _decode_odd(data, max_pixels)


def _png_chunks(data: bytes) -> set[bytes]:
    """The kinds of chunk in a PNG, all of them whole.

    Checked here because OpenCV is too trusting: it fills up a file that was cut off with black, and
    believes a damaged length, for which it allocates gigabytes.
    """
    kinds: set[bytes] = set()
    position = len(_PNG)
    while b"IEND" not in kinds:
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise _Unreadable(f"it is a PNG cut off inside its {kind!r} chunk, or that is damaged")
        # The view spares copying a whole picture; the checksum covers the kind and the contents.
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise _Unreadable(f"it is a PNG with a damaged {kind!r} chunk at byte {position}")
        if not kinds and kind != b"IHDR":
            raise _Unreadable(f"it is a PNG that begins with {kind!r}")
        kinds.add(kind)
        position = end
    return kinds


def _decode_webp(data: bytes, max_pixels: int) -> np.ndarray:
    if len(data) < int.from_bytes(data[4:8], "little") + 8:
        raise _Unreadable(f"it is a WebP cut off after {len(data)} bytes")
    kind = data[12:16]
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    else:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        if data[20] & 0b0000_1010:  # EXIF, animation
            return _decode_odd(data, max_pixels)
    _check_size(width, height, max_pixels)
    return _decode_opencv(data)


def _decode_opencv(data: bytes) -> np.ndarray:
    """8-bit colour, with or without alpha; OpenCV keeps blue first."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.dtype != np.uint8:
        raise _Unreadable("it is damaged")
    if image.shape[2] == 3:
        order = cv2.COLOR_BGR2RGB
    elif cv2.minMaxLoc(cv2.extractChannel(image, 3))[0] == 255:
        order = cv2.COLOR_BGRA2RGB
    else:
        order = cv2.COLOR_BGRA2RGBA
    pixels: np.ndarray = cv2.cvtColor(image, order)
    return pixels


def _decode_odd(data: bytes, max_pixels: int) -> np.ndarray:
    """Whatever Pillow can read, turned as EXIF says, as RGB or RGBA."""
    try:
        image: Any = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError:
        raise _Unreadable("it begins like a picture, but is none") from None
    with image:
        _check_size(image.width, image.height, max_pixels)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits of grey; converting would clip
            grey = np.asarray(image, np.float64)
            scale = 1 / 257 if grey.max() > 255 else 1.0
            image = Image.fromarray((grey * scale).clip(0, 255).round().astype(np.uint8))
        pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    if pixels.shape[2] == 4 and pixels[..., 3].min() == 255:
        pixels = pixels[..., :3]
    return np.ascontiguousarray(pixels)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _Unreadable(f"its header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise _Unreadable(f"it has {width} x {height} pixels, more than the {max_pixels:,} that are accepted")
