"""Bytes of a picture file to pixels: quickly for the usual files, correctly for the odd ones.

The size is read from the header and checked before anything is decoded, so a small file cannot ask
for all the memory. JPEG goes to simplejpeg, plain PNG and WebP to OpenCV; what those read wrongly
or not at all (inks, palettes, 16 bits, animations, GIF, BMP, TIFF) goes to Pillow.

Where a JPEG has many more pixels than are wanted, it is decoded at one half, a quarter or an eighth
of its size, which libjpeg does while it decodes, for less than decoding all of it.
"""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.content.headers import (
    FAILURES,
    PILLOW_FORMATS,
    Header,
    Unreadable,
    bad_image,
    read_header,
)

__all__ = ["MAX_PIXELS", "Header", "check_pixels", "decode", "decode_pixels", "read_header"]

MAX_PIXELS = 64 * 2**20
"""Largest picture that is decoded unless told otherwise; 8192 x 8192, 200 MB as RGB."""
_MOST_SCANS = 32
"""A progressive JPEG of the largest size may have so many scans, a smaller one more in proportion;
usual are 10. A few bytes are enough for a scan of the whole picture, so a file of thousands would
take hours."""
_STRIP_PIXELS = 1 << 20
"""Odd pictures are converted in strips of about so many pixels, so that large ones are in memory
twice at most."""


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode one picture, turned the right way up.

    Args:
        data: A JPEG, PNG, WebP, GIF, BMP or TIFF file; of an animation the first picture is taken.
        max_pixels: Largest width x height that is accepted.
        at_least: Height and width that are enough; see `decode_pixels`.

    Returns:
        uint8 `[height, width, 3]`, RGB; or `[height, width, 4]`, RGBA with straight (not
        multiplied) alpha, if any pixel is not opaque.

    Raises:
        DataError: Not a picture, cut off, damaged, or too large (slug `bad-image`).
    """
    header = read_header(data)
    check_pixels(header, max_pixels)
    return decode_pixels(data, header, at_least)[0]


def check_pixels(header: Header, max_pixels: int) -> None:
    """Refuse what would take too much memory or time to decode.

    Raises:
        DataError: It is larger than `max_pixels`, or has a great many scans (slug `bad-image`).
    """
    pixels, most = header.width * header.height, max_pixels // header.copies
    if pixels > most:
        kind = "" if header.copies == 1 else " of animations and of pictures in printing inks"
        raise bad_image(
            f"it has {header.width} x {header.height} pixels, more than the {most:,} that are accepted{kind}"
        )
    if header.scans > _MOST_SCANS and header.scans * pixels > _MOST_SCANS * max_pixels:
        raise bad_image(f"it is a progressive JPEG of {header.scans} scans, too many for its size")


def decode_pixels(
    data: bytes, header: Header, at_least: tuple[int, int] | None = None
) -> tuple[np.ndarray, int]:
    """Decode a picture whose header was read and found acceptable.

    Args:
        data: The file.
        header: Of this file.
        at_least: Height and width that are enough; a JPEG that is at least 2, 4 or 8 times as large
            comes reduced by that, each of its pixels the mean of a square of the file's. None asks
            for all pixels.

    Returns:
        The pixels, as `decode` gives them, and by what they are reduced: 1, 2, 4 or 8. A picture of
        `h x w` comes as `ceil(h / reduced) x ceil(w / reduced)`.

    Raises:
        DataError: The picture is cut off or damaged (slug `bad-image`).
    """
    reduced = 1
    try:
        if header.decoder == "jpeg":
            reduced = _reduction(header, at_least) if at_least else 1
            pixels, reduced = _decode_jpeg(data, header, reduced)
        elif header.decoder == "opencv":
            pixels = _decode_opencv(data)
        else:
            pixels = _decode_pillow(data)
        if header.orientation != 1:
            pixels = _turn(pixels, header.orientation)
    except (Unreadable, cv2.error, *FAILURES) as error:
        raise bad_image(error) from error
    if pixels.shape[:2] != (-(-header.height // reduced), -(-header.width // reduced)):
        raise bad_image(
            f"it decodes to {pixels.shape[1]} x {pixels.shape[0]} pixels, but its header says "
            f"{header.width} x {header.height}"
        )
    return pixels, reduced


def _reduction(header: Header, at_least: tuple[int, int]) -> int:
    height, width = at_least
    for reduced in (8, 4, 2):
        enough = header.height >= reduced * height and header.width >= reduced * width
        # The last pixels of a row or column may be averages with what is no longer picture. Turned,
        # they would come first, and all the others lie beside where they are expected.
        whole = header.height % reduced == 0 and header.width % reduced == 0
        if enough and (whole or header.orientation == 1):
            return reduced
    return 1


def _decode_jpeg(data: bytes, header: Header, reduced: int) -> tuple[np.ndarray, int]:
    pixels: np.ndarray
    try:
        if reduced == 1:
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        else:
            # The smallest size that libjpeg offers and that is no smaller than asked for.
            height, width = -(-header.height // reduced), -(-header.width // reduced)
            if header.orientation >= 5:
                height, width = width, height
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="RGB", min_height=height, min_width=width
            )
    except ValueError:
        # Strict about any oddity; Pillow forgives all but lost data.
        return _decode_pillow(data), 1
    return pixels, reduced


def _decode_opencv(data: bytes) -> np.ndarray:
    """8-bit color, with or without alpha; OpenCV keeps blue first."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.dtype != np.uint8:
        raise Unreadable("it is damaged")
    if image.shape[2] == 3:
        order = cv2.COLOR_BGR2RGB
    elif cv2.minMaxLoc(cv2.extractChannel(image, 3))[0] == 255:
        order = cv2.COLOR_BGRA2RGB
    else:
        order = cv2.COLOR_BGRA2RGBA
    pixels: np.ndarray = cv2.cvtColor(image, order)
    return pixels


def _decode_pillow(data: bytes) -> np.ndarray:
    """Whatever Pillow can read, as RGB or RGBA, not turned."""
    image: Any
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        image.load()
        scale = _gray_scale(image)
        mode = "RGBA" if image.has_transparency_data and scale is None else "RGB"
        pixels = np.empty((image.height, image.width, len(mode)), np.uint8)
        rows = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(image.height, top + rows)))
            if scale is not None:
                gray = np.asarray(strip, np.float64) * scale
                strip = Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))
            pixels[top : top + rows] = np.asarray(strip.convert(mode))
    if len(mode) == 4 and cv2.minMaxLoc(cv2.extractChannel(pixels, 3))[0] == 255:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
    return pixels


def _gray_scale(image: Any) -> float | None:
    """What turns gray of more than 8 bits, which Pillow would clip, into 0..255; None for other
    pictures."""
    if image.mode.startswith("I;16"):
        return 1 / 257
    if image.mode in ("I", "F"):
        return 1 / 257 if image.getextrema()[1] > 255 else 1.0
    return None


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF says; each line was compared with Pillow's `exif_transpose`."""
    turned: np.ndarray
    match orientation:
        case 2:
            turned = cv2.flip(pixels, 1)
        case 3:
            turned = cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            turned = cv2.flip(pixels, 0)
        case 5:
            turned = cv2.transpose(pixels)
        case 6:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            turned = cv2.flip(cv2.transpose(pixels), -1)
        case _:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return turned
