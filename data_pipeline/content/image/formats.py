"""Image formats by signature: which there are, and how the less usual ones are opened.

JPEG, PNG, WebP, GIF, BMP and TIFF are always supported. PPM, JPEG 2000 and AVIF are decoded by
Pillow, HEIC by the optional package pillow-heif. Others are recognized for the error message.
"""

from __future__ import annotations

import io
import re
import struct
from functools import lru_cache

from PIL import Image, UnidentifiedImageError

from data_pipeline.common.errors import DataError

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"BM", "bmp"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
    (b"8BPS", "psd"),
    (b"%PDF", "pdf"),
    (b"<svg", "svg"),
)
_PPM = re.compile(rb"P[1-6][\s#]")
_HEIF_BRANDS = frozenset(
    (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
)
_AVIF_BRANDS = frozenset((b"avif", b"avis"))

_UNSUPPORTED = {"jxl": "JPEG XL", "psd": "Photoshop", "pdf": "PDF", "svg": "SVG"}
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Usual formats that Pillow may decode; its plug-ins for some others start external programs."""
_OTHER_PILLOW_FORMATS = {"ppm": "PPM", "jp2": "JPEG2000", "avif": "AVIF", "heic": "HEIF"}
"""Names of the less usual formats in Pillow."""
_CODESTREAM = b"\xff\x4f\xff\x51"
"""Start of a JPEG 2000 codestream: its marker, and that of its size."""


class UnreadableImageError(Exception):
    """Reason why an image cannot be read; converted to a DataError."""


def image_format(data: bytes) -> str:
    """The format of an image file, by its signature.

    Returns:
        `jpg`, `png`, `webp`, `gif`, `tif`, `bmp`, `ppm` (also PGM and PBM), `jp2`, `avif`, `heic`;
        `jxl`, `psd`, `pdf` or `svg`, which are not supported; empty if it is unknown.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[4:8] == b"ftyp":
        return _heif_format(data)
    return "ppm" if _PPM.match(data) else ""


def check_supported(format_name: str) -> None:
    """Check that a format can be decoded; prepares its decoder.

    Args:
        format_name: A result of `image_format`, not empty.

    Raises:
        DataError: It cannot (slug `unsupported-format`).
    """
    if problem := _problem(format_name):
        raise DataError(problem, slug="unsupported-format")


def open_with_pillow(data: bytes) -> Image.Image:
    """Open with Pillow, which reads only the header.

    Raises:
        UnreadableImageError: Its content is not that of an image.
    """
    name = _OTHER_PILLOW_FORMATS.get(image_format(data))
    try:
        return Image.open(io.BytesIO(data), formats=(name,) if name else _PILLOW_FORMATS)
    except UnidentifiedImageError:
        raise UnreadableImageError(
            "its signature is that of an image, its content is not"
        ) from None


def check_jp2_memory(data: bytes, width: int, height: int) -> None:
    """Reject a JPEG 2000 image that takes more memory than its header suggests.

    Its codestream has a size of its own, and a tile larger than the image is decoded as a whole.

    Raises:
        UnreadableImageError: It does.
    """
    start = data.find(_CODESTREAM)
    x1, y1, x0, y0, tile_width, tile_height = struct.unpack_from(">6I", data, start + 8)
    if start < 0 or (x1 - x0, y1 - y0) != (width, height):
        raise UnreadableImageError("the header of its codestream differs from that of the file")
    if tile_width * tile_height > 4 * max(x1 * y1, 1 << 20):
        raise UnreadableImageError(
            f"it has {width} x {height} pixels, but tiles of {tile_width} x {tile_height}"
        )


def _heif_format(data: bytes) -> str:
    """`avif` or `heic` by the brands of the first box; empty for others, such as videos."""
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[8:12], *(data[start : start + 4] for start in range(16, size, 4))]
    if brands[0] not in _HEIF_BRANDS | _AVIF_BRANDS:
        return ""
    return "avif" if _AVIF_BRANDS.intersection(brands) else "heic"


@lru_cache
def _problem(format_name: str) -> str:
    """Why a format cannot be decoded, and what to do; empty if it can."""
    if name := _UNSUPPORTED.get(format_name):
        return f"{name} files are not supported; convert them to JPEG or PNG"
    if format_name == "avif":
        return _prepare_avif()
    if format_name == "heic":
        return _prepare_heic()
    return ""


def _prepare_avif() -> str:
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return "AVIF files need Pillow 11.3 or later; update it, or convert them to JPEG or PNG"
    if not AvifImagePlugin.SUPPORTED:
        return "this build of Pillow cannot read AVIF files; convert them to JPEG or PNG"
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the loader decodes in several processes
    return ""


def _prepare_heic() -> str:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return (
            "HEIC files need the package pillow-heif, which is not installed; run "
            "`pip install 'vlmoe[heif]'`, or convert them to JPEG or PNG"
        )
    register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return ""
