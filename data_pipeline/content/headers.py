"""What a picture file is and how large, from its header alone: cheap, and before anything is
decoded.

What a file is follows from its first bytes, never from its name. The size is the one that people
see: a camera that was held sideways says so in EXIF, and width and height are exchanged here as
well.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipeline.common.errors import DataError

PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Others stay out: some of Pillow's plug-ins start other programs.

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
"""The EXIF (and TIFF) tag that says how a picture is to be turned."""
_TILE_TAGS = (322, 323)
"""Width and height of a TIFF's tiles."""

_OTHER_EXIF = (b"Raw profile type", b"XML:com.adobe.xmp")
"""Texts of a PNG that may hold an orientation; Pillow knows how."""

_SKIPPED = frozenset((0xFFDB, 0xFFC4, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)))
"""JPEG segments before the frame that only have to be stepped over: tables, comments,
applications'."""
_FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
_PROGRESSIVE = frozenset((0xFFC2, 0xFFC6, 0xFFCA, 0xFFCE))
_SCAN = b"\xff\xda"

FAILURES = (
    ValueError,
    OSError,
    SyntaxError,
    struct.error,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    Image.DecompressionBombError,
)
"""Decoders fail in all these ways on damaged files; whichever it was, the picture is bad."""


class Header(NamedTuple):
    """A picture before it is decoded."""

    decoder: str
    """`jpeg`, `opencv` or `pillow`: what reads it correctly."""
    width: int
    height: int
    """Pixels, turned the right way up."""
    orientation: int = 1
    """How the stored picture has to be turned, as EXIF counts: 1 is not at all."""
    scans: int = 1
    """Of a progressive JPEG: how often its pixels are gone through."""
    copies: int = 1
    """How much more memory than usual it takes to decode."""


class Unreadable(Exception):
    """Why a picture cannot be read; becomes a DataError."""


def read_header(data: bytes) -> Header:
    """Kind and size of a picture.

    Args:
        data: A whole JPEG, PNG, WebP, GIF, BMP or TIFF file.

    Raises:
        DataError: Not a picture, cut off or damaged as far as the header shows (slug `bad-image`).
    """
    try:
        header = _read(data)
    except (Unreadable, *FAILURES) as error:
        raise bad_image(error) from error
    if header.width < 1 or header.height < 1:
        raise bad_image(f"its header says {header.width} x {header.height} pixels")
    return header


def bad_image(why: object) -> DataError:
    """The error of a picture that cannot be used."""
    return DataError(f"the picture cannot be decoded: {why}", slug="bad-image")


def _read(data: bytes) -> Header:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG):
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] == b"GIF8":
        return _gif(data)
    if data[:4] in (b"II*\0", b"MM\0*") or data[:2] == b"BM":
        return _other(data)
    beginning = f"begins with {data[:12]!r}" if data else "is empty"
    raise Unreadable(f"it {beginning}, which is no JPEG, PNG, WebP, GIF, BMP or TIFF")


def _jpeg(data: bytes) -> Header:
    position, orientation, exifs, xmp_turns = 2, 1, 0, False
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        if marker in _FRAMES:
            break
        if marker not in _SKIPPED or length < 2:
            return _odd_jpeg(data)
        if marker == 0xFFE1:
            if data.startswith(b"Exif\0\0", position + 4):
                exifs += 1
                orientation = _exif_orientation(data, position + 10, position + 2 + length)
            else:
                xmp_turns |= data.find(b"tiff:Orientation", position, position + length) >= 0
        position += 2 + length
    height, width, colors = struct.unpack_from(">HHB", data, position + 5)
    scans = data.count(_SCAN) if marker in _PROGRESSIVE else 1
    # Inks, and orientations in unusual places, are left to Pillow.
    if colors not in (1, 3) or exifs > 1 or orientation < 0 or xmp_turns:
        return _other(data)._replace(scans=scans, copies=2 if colors == 4 else 1)
    return _turned("jpeg", width, height, orientation)._replace(scans=scans)


def _odd_jpeg(data: bytes) -> Header:
    """One whose beginning is unusual: its real size is what the decoder takes it for."""
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    if colors in ("CMYK", "YCCK") or b"Exif\0\0" in data:
        return _other(data)._replace(scans=data.count(_SCAN), copies=2)
    return Header("jpeg", width, height, scans=data.count(_SCAN))


def _exif_orientation(data: bytes, start: int, end: int) -> int:
    """The orientation in an EXIF block; 1 if it has none, -1 if it is spelt unusually."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[start : start + 4])
    if order is None:
        return -1
    try:
        position = start + int(struct.unpack_from(order + "I", data, start + 4)[0])
        (count,) = struct.unpack_from(order + "H", data, position)
        if position + 2 + 12 * count > end:
            return -1
        for entry in range(position + 2, position + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(order + "HHIH", data, entry)
            if tag == _ORIENTATION:
                return value if (kind, values) == (3, 1) else -1
    except struct.error:
        return -1
    return 1


def _turned(decoder: str, width: int, height: int, orientation: int) -> Header:
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return Header(decoder, width, height, orientation if 1 <= orientation <= 8 else 1)


def _png(data: bytes) -> Header:
    """Also goes through its chunks, all of which must be whole.

    Checked here because OpenCV is too trusting: it fills up a file that was cut off with black, and
    believes a damaged length, for which it allocates gigabytes.
    """
    width, height, depth, color_type = struct.unpack(">IIBB", data[16:26])
    plain, orientation = depth == 8 and color_type in (2, 6), 1
    position, kind = len(_PNG), b""
    view = memoryview(data)  # spares copying a whole picture for its checksum
    while kind != b"IEND":
        first = not kind
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise Unreadable(f"it is a PNG cut off inside its {kind!r} chunk, or that is damaged")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise Unreadable(f"it is a PNG with a damaged {kind!r} chunk at byte {position}")
        if first and (kind, length) != (b"IHDR", 13):
            raise Unreadable(f"it is a PNG that begins with {kind!r}")
        if kind == b"eXIf":
            orientation = _exif_orientation(data, position + 8, end - 4)
        elif kind in (b"tRNS", b"acTL"):
            plain = False
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_OTHER_EXIF, position + 8):
            orientation = -1
        position = end
    if orientation < 0:
        return _turned("pillow", width, height, _pillow_orientation(data))
    return _turned("opencv" if plain else "pillow", width, height, orientation)


def _webp(data: bytes) -> Header:
    size = int.from_bytes(data[4:8], "little") + 8
    if len(data) < size:
        raise Unreadable(f"it is a WebP cut off after {len(data)} bytes")
    kind = data[12:16]
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return Header("opencv", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
        return Header("opencv", width, height)
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    orientation, position = 1, 12
    while data[20] & 0b0000_1000 and position + 8 <= size:  # it says that it has EXIF
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            start = position + (14 if data.startswith(b"Exif\0\0", position + 8) else 8)
            orientation = _exif_orientation(data, start, position + 8 + length)
            break
        position += 8 + length + length % 2
    if data[20] & 0b0000_0010:
        # An animation: Pillow holds two of its pictures, and would do so only to say how large they
        # are.
        return _turned("pillow", width, height, orientation)._replace(copies=2)
    xmp_turns = data[20] & 0b0000_0100 and data.find(b"tiff:Orientation") >= 0
    if orientation < 0 or (orientation == 1 and xmp_turns):
        return _other(data)
    return _turned("opencv", width, height, orientation)


def _gif(data: bytes) -> Header:
    """Its screen, or what its first picture needs beyond that, as Pillow reads it."""
    width, height, flags = struct.unpack("<HHB", data[6:11])
    position = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    while data[position : position + 1] == b"!":
        position += 2
        while length := data[position]:
            position += 1 + length
        position += 1
    if data[position : position + 1] != b",":
        raise Unreadable("it is a GIF without a picture")
    left, top, frame_width, frame_height = struct.unpack_from("<4H", data, position + 1)
    return Header("pillow", max(width, left + frame_width), max(height, top + frame_height))


def _other(data: bytes) -> Header:
    """Whatever Pillow can read; its own idea of the size."""
    with _opened(data) as image:
        (width, height), kind = image.size, image.format
        if kind == "TIFF":
            # A tile may be larger than the picture, and is decoded as a whole.
            tile = [int(image.tag_v2.get(tag, 1)) for tag in _TILE_TAGS]  # type: ignore[attr-defined]
            if tile[0] * tile[1] > 4 * max(width * height, 1 << 20):
                raise Unreadable(
                    f"it has {width} x {height} pixels, but tiles of {tile[0]} x {tile[1]}"
                )
            return Header("pillow", width, height)  # Pillow turns these itself
    return _turned("pillow", width, height, _pillow_orientation(data))


def _pillow_orientation(data: bytes) -> int:
    with _opened(data) as image:
        found = image.getexif().get(_ORIENTATION, 1)
    return found if isinstance(found, int) else 1


def _opened(data: bytes) -> Image.Image:
    """Its header read by Pillow."""
    try:
        return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except UnidentifiedImageError:
        raise Unreadable("it begins like a picture, but is none") from None
