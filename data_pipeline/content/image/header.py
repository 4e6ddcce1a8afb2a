"""Format and size of an image file from its header, before anything is decoded.

The format is determined by the first bytes, never by the file name. Width and height are those
after applying the EXIF orientation. `read_header` also selects the decoder that handles the file
correctly; `decoding` decodes.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import simplejpeg
from PIL import Image

from data_pipeline.common.errors import DataError
from data_pipeline.content.image.formats import (
    UnreadableImageError,
    check_jp2_memory,
    check_supported,
    image_format,
    open_with_pillow,
)

_MEMORY_FACTORS = {"jp2": 4, "avif": 2, "heic": 2}
"""Memory for decoding: JPEG 2000 uses 32-bit integers, AVIF and HEIC an intermediate YUV image."""

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
"""EXIF and TIFF tag of the orientation."""
_TILE_TAGS = (322, 323)
"""TIFF tags of the tile width and height."""

_PNG_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_EXIF_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")
"""Keywords of PNG text chunks that may contain an orientation; Pillow parses them."""

_SKIPPED_MARKERS = frozenset((0xFFDB, 0xFFC4, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)))
"""JPEG segments before the frame that need no parsing: tables, comments, application data."""
_FRAME_MARKERS = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
_PROGRESSIVE_MARKERS = frozenset((0xFFC2, 0xFFC6, 0xFFCA, 0xFFCE))
_START_OF_SCAN = b"\xff\xda"
_APP1 = 0xFFE1

DECODE_ERRORS = (
    ValueError,
    OSError,
    SyntaxError,
    struct.error,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    Image.DecompressionBombError,
)
"""Exceptions that decoders raise for corrupt files."""


class ImageHeader(NamedTuple):
    """Properties of an image that are known before decoding."""

    decoder: str
    """`jpeg`, `opencv` or `pillow`: the decoder that handles this file correctly."""
    width: int
    height: int
    """Pixels, after applying the orientation."""
    orientation: int = 1
    """EXIF orientation that still has to be applied; 1 is the identity."""
    scans: int = 1
    """Number of scans of a progressive JPEG."""
    memory_factor: int = 1
    """Memory for decoding, relative to an ordinary image of this size."""


def read_header(data: bytes) -> ImageHeader:
    """Format and size of an image.

    Args:
        data: A complete image file of a format in `formats.py`.

    Raises:
        DataError: Not an image, or truncated or corrupt as far as the header shows (slug
            `corrupt-image`), or of a format that cannot be decoded (slug `unsupported-format`).
    """
    try:
        header = _parse(data)
    except (struct.error, IndexError) as error:  # a read after the end
        raise corrupt_image_error(
            f"it is truncated: its header is incomplete after {len(data):,} bytes"
        ) from error
    except (UnreadableImageError, *DECODE_ERRORS) as error:
        raise corrupt_image_error(error) from error
    if header.width < 1 or header.height < 1:
        raise corrupt_image_error(f"its header gives {header.width} x {header.height} pixels")
    return header


def corrupt_image_error(reason: object) -> DataError:
    """The error for an image that cannot be decoded."""
    return DataError(f"the image cannot be decoded: {reason}", slug="corrupt-image")


def _parse(data: bytes) -> ImageHeader:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG):
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] == b"GIF8":
        return _gif(data)
    if data[:4] in (b"II*\0", b"MM\0*") or data[:2] == b"BM":
        return _with_pillow(data)
    if not (format_name := image_format(data)):
        beginning = f"begins with {data[:12]!r}" if data else "is empty"
        raise UnreadableImageError(f"it {beginning}, expected JPEG, PNG, WebP or another image")
    check_supported(format_name)
    header = _with_pillow(data)
    if format_name == "jp2":
        check_jp2_memory(data, header.width, header.height)
    return header._replace(memory_factor=_MEMORY_FACTORS.get(format_name, 1))


def _jpeg(data: bytes) -> ImageHeader:
    position, orientation, num_exif, xmp_orientation = 2, 1, 0, False
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        if marker in _FRAME_MARKERS:
            break
        if marker not in _SKIPPED_MARKERS or length < 2:
            return _unusual_jpeg(data)
        if marker == _APP1:
            if data.startswith(b"Exif\0\0", position + 4):
                num_exif += 1
                orientation = _exif_orientation(data, position + 10, position + 2 + length)
            else:
                tag_position = data.find(b"tiff:Orientation", position, position + length)
                xmp_orientation |= tag_position >= 0
        position += 2 + length

    height, width, channels = struct.unpack_from(">HHB", data, position + 5)
    scans = data.count(_START_OF_SCAN) if marker in _PROGRESSIVE_MARKERS else 1

    # Pillow handles CMYK and orientations in unusual places.
    if channels not in (1, 3) or num_exif > 1 or orientation < 0 or xmp_orientation:
        memory_factor = 2 if channels == 4 else 1
        return _with_pillow(data)._replace(scans=scans, memory_factor=memory_factor)
    return _oriented("jpeg", width, height, orientation)._replace(scans=scans)


def _unusual_jpeg(data: bytes) -> ImageHeader:
    """Header of a JPEG with unknown segments: the size is read by the decoder."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    scans = data.count(_START_OF_SCAN)
    if colorspace in ("CMYK", "YCCK") or b"Exif\0\0" in data:
        return _with_pillow(data)._replace(scans=scans, memory_factor=2)
    return ImageHeader("jpeg", width, height, scans=scans)


def _exif_orientation(data: bytes, start: int, end: int) -> int:
    """Orientation in an EXIF block; 1 if there is none, -1 if its encoding is unusual."""
    byte_order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[start : start + 4])
    if byte_order is None:
        return -1
    try:
        position = start + int(struct.unpack_from(byte_order + "I", data, start + 4)[0])
        (num_entries,) = struct.unpack_from(byte_order + "H", data, position)
        if position + 2 + 12 * num_entries > end:
            return -1
        for offset in range(position + 2, position + 2 + 12 * num_entries, 12):
            tag, kind, count, value = struct.unpack_from(byte_order + "HHIH", data, offset)
            if tag == _ORIENTATION:
                return value if (kind, count) == (3, 1) else -1
    except struct.error:
        return -1
    return 1


def _oriented(decoder: str, width: int, height: int, orientation: int) -> ImageHeader:
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return ImageHeader(decoder, width, height, orientation if 1 <= orientation <= 8 else 1)


def _png(data: bytes) -> ImageHeader:
    """Header of a PNG; validates all chunks.

    OpenCV does not: it fills the rest of a truncated file with black, and allocates gigabytes for a
    corrupt length.
    """
    width, height, depth, color_type = struct.unpack(">IIBB", data[16:26])
    opencv_compatible, orientation = depth == 8 and color_type in (2, 6), 1
    position, kind = len(_PNG), b""
    view = memoryview(data)  # avoids a copy of the image for the checksum
    while kind != b"IEND":
        is_first = not kind
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise UnreadableImageError(f"it is a PNG that is truncated in its {kind!r} chunk")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise UnreadableImageError(
                f"it is a PNG with a corrupt {kind!r} chunk at byte {position}"
            )
        if is_first and (kind, length) != (b"IHDR", 13):
            raise UnreadableImageError(f"it is a PNG that begins with {kind!r}, expected IHDR")

        if kind == b"eXIf":
            orientation = _exif_orientation(data, position + 8, end - 4)
        elif kind in (b"tRNS", b"acTL"):
            opencv_compatible = False
        elif kind in _PNG_TEXT_CHUNKS and data.startswith(_PNG_EXIF_TEXTS, position + 8):
            orientation = -1
        position = end

    if orientation < 0:
        return _oriented("pillow", width, height, _pillow_orientation(data))
    return _oriented("opencv" if opencv_compatible else "pillow", width, height, orientation)


def _webp(data: bytes) -> ImageHeader:
    size = int.from_bytes(data[4:8], "little") + 8
    if len(data) < size:
        raise UnreadableImageError(f"it is a WebP truncated after {len(data)} of {size} bytes")

    kind = data[12:16]
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return ImageHeader("opencv", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
        return ImageHeader("opencv", width, height)
    return _extended_webp(data, size)


def _extended_webp(data: bytes, size: int) -> ImageHeader:
    """Header of a WebP in the extended format (VP8X), which may have EXIF, XMP or an animation."""
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    has_exif, has_xmp = data[20] & 0b0000_1000, data[20] & 0b0000_0100
    is_animation = data[20] & 0b0000_0010

    orientation, position = 1, 12
    while has_exif and position + 8 <= size:
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            start = position + (14 if data.startswith(b"Exif\0\0", position + 8) else 8)
            orientation = _exif_orientation(data, start, position + 8 + length)
            break
        position += 8 + length + length % 2

    if is_animation:
        # Pillow keeps two frames in memory, and would already do so to read the size.
        return _oriented("pillow", width, height, orientation)._replace(memory_factor=2)
    xmp_orientation = has_xmp and data.find(b"tiff:Orientation") >= 0
    if orientation < 0 or (orientation == 1 and xmp_orientation):
        return _with_pillow(data)
    return _oriented("opencv", width, height, orientation)


def _gif(data: bytes) -> ImageHeader:
    """Header of a GIF: the logical screen, enlarged to contain the first frame as in Pillow."""
    width, height, flags = struct.unpack("<HHB", data[6:11])
    position = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    while data[position : position + 1] == b"!":
        position += 2
        while length := data[position]:
            position += 1 + length
        position += 1
    if data[position : position + 1] != b",":
        raise UnreadableImageError("it is a GIF without a frame")
    left, top, frame_width, frame_height = struct.unpack_from("<4H", data, position + 1)
    return ImageHeader("pillow", max(width, left + frame_width), max(height, top + frame_height))


def _with_pillow(data: bytes) -> ImageHeader:
    """Header as Pillow reads it."""
    with open_with_pillow(data) as image:
        (width, height), kind = image.size, image.format
        if kind == "TIFF":
            # A tile may be larger than the image, and is decoded as a whole.
            tags = image.tag_v2  # type: ignore[attr-defined]
            tile = [int(tags.get(tag, 1)) for tag in _TILE_TAGS]
            if tile[0] * tile[1] > 4 * max(width * height, 1 << 20):
                raise UnreadableImageError(
                    f"it has {width} x {height} pixels, but tiles of {tile[0]} x {tile[1]}"
                )
            return ImageHeader("pillow", width, height)  # Pillow applies the orientation of a TIFF
    return _oriented("pillow", width, height, _pillow_orientation(data))


def _pillow_orientation(data: bytes) -> int:
    with open_with_pillow(data) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1
