"""Pictures made by formula, and files made of them with Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps


def smooth(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    """A picture that lossy formats change little: gentle ramps, each channel another."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        x * 240 / width,
        y * 200 / height,
        255 - x * 120 / width - y * 60 / height,
        40 + x * 150 / width,
    ]
    return np.stack(planes[:channels], axis=-1).clip(0, 255).astype(np.uint8)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with the fine structure of a photograph: contrast at every scale, edges and thin
    lines."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    waves = rng.normal(size=(2, 3, *frequency.shape))
    y, red, blue = (
        np.fft.irfft2((a + 1j * b) / frequency, (height, width))
        for a, b in zip(*waves, strict=True)
    )
    light, red, blue = (plane / plane.std() for plane in (y, red, blue))
    colors = np.stack([0.9 * light + 0.3 * red, light, 0.9 * light + 0.3 * blue], axis=-1)
    image = (128 + 45 * colors).clip(0, 255).astype(np.uint8)
    for _ in range(25):
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        (x0, x1), (y0, y1) = rng.integers(0, width, 2).tolist(), rng.integers(0, height, 2).tolist()
        cv2.line(image, (x0, y0), (x1, y1), color, int(rng.integers(1, 6)), cv2.LINE_AA)
        cv2.circle(image, (x1, y0), int(rng.integers(5, height // 6 + 6)), color, 2, cv2.LINE_AA)
    return image


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """A file of that kind, made by Pillow."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """Pillow's own result, whole and turned: uint8 RGB, or RGBA if any pixel is not opaque."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return pixels[..., :3] if pixels.shape[2] == 4 and pixels[..., 3].min() == 255 else pixels


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int) -> bytes:
    """A correct PNG of one color: a few bytes a row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    squeeze = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(squeeze.compress(row * min(64, height - top)) for top in range(0, height, 64))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", body + squeeze.flush())
        + png_chunk(b"IEND", b"")
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, dB; infinite if they are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def exif(orientation: int, *, big_endian: bool = False) -> bytes:
    """An EXIF block with a few tags, as cameras write it."""
    tags = Image.Exif()
    tags.endian = ">" if big_endian else "<"
    tags[0x010F], tags[0x0112], tags[0x0131] = "a camera", orientation, "its program"
    return tags.tobytes()


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(smooth()).quantize(16)
    if transparent:
        image.info["transparency"] = 3
    return image


def picture_files() -> dict[str, bytes]:
    """A small file of every kind, by its name."""
    gray, large = smooth()[..., 0], photo(61, 93)
    return {
        "png rgb": encoded(smooth(), "PNG"),
        "png rgba": encoded(smooth(channels=4), "PNG"),
        "png grey": encoded(gray, "PNG"),
        "png gray alpha": encoded(Image.fromarray(smooth(channels=4)).convert("LA"), "PNG"),
        "png 1 bit": encoded(Image.fromarray(gray).convert("1"), "PNG"),
        "png palette": encoded(palette(False), "PNG"),
        "png palette, one color transparent": encoded(palette(True), "PNG", transparency=3),
        "png palette, alpha by color": encoded(
            palette(False), "PNG", transparency=bytes(range(0, 255, 16))
        ),
        "png rgb, one color transparent": encoded(
            smooth(), "PNG", transparency=tuple(smooth()[3, 4].tolist())
        ),
        "bmp": encoded(smooth(), "BMP"),
        "bmp palette": encoded(palette(False), "BMP"),
        "bmp 1 bit": encoded(Image.fromarray(gray).convert("1"), "BMP"),
        "gif": encoded(palette(False), "GIF"),
        "gif transparent": encoded(palette(True), "GIF", transparency=3),
        "tiff": encoded(smooth(), "TIFF"),
        "tiff rgba": encoded(smooth(channels=4), "TIFF"),
        "tiff lzw": encoded(smooth(), "TIFF", compression="tiff_lzw"),
        "tiff deflate": encoded(smooth(), "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encoded(smooth(48, 64), "TIFF", compression="jpeg"),
        "tiff packbits": encoded(palette(False), "TIFF", compression="packbits"),
        "tiff cmyk": encoded(
            Image.fromarray(smooth()).convert("CMYK"), "TIFF", compression="tiff_lzw"
        ),
        "tiff fax": encoded(Image.fromarray(gray).convert("1"), "TIFF", compression="group4"),
        "webp lossless": encoded(smooth(), "WEBP", lossless=True),
        "webp lossless alpha": encoded(smooth(channels=4), "WEBP", lossless=True, exact=True),
        "webp": encoded(photo(90, 60), "WEBP", quality=80),
        "webp alpha": encoded(smooth(60, 90, channels=4), "WEBP", quality=80),
        "jpeg 4:2:0": encoded(large, "JPEG", quality=85, subsampling=2),
        "jpeg 4:2:2": encoded(large, "JPEG", quality=85, subsampling=1),
        "jpeg 4:4:4": encoded(large, "JPEG", quality=85, subsampling=0),
        "jpeg grey": encoded(large[..., 0], "JPEG", quality=85),
        "jpeg progressive": encoded(large, "JPEG", quality=85, progressive=True),
        "jpeg with restart marks": encoded(large, "JPEG", quality=85, restart_marker_rows=1),
        "jpeg in rgb": encoded(large, "JPEG", quality=85, keep_rgb=True),
        "jpeg cmyk": encoded(Image.fromarray(large).convert("CMYK"), "JPEG", quality=85),
        "jpeg with comment": encoded(large, "JPEG", comment=b"Exif, ff d8 and other words"),
    }


def picture_bombs() -> dict[str, bytes]:
    """Small files that ask for gigabytes: each claims 30,000 x 30,000 pixels or as many as its kind
    can."""
    lzw = b"\x02\x02\x4c\x01\x00"
    gif_screen = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    gif_frame = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + lzw + b";"
    jpeg = bytearray(encoded(smooth(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    tags = {256: 30_000, 257: 30_000, 258: 8, 259: 5, 262: 1, 273: 8, 277: 1, 278: 30_000, 279: 50}
    tiff = (
        b"II*\0"
        + struct.pack("<IH", 58, len(tags))[:4]
        + bytes(50)
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        + bytes(4)
    )
    webp = encoded(smooth(), "WEBP", lossless=True)
    bits = int.from_bytes(webp[21:25], "little") | 0xFFF_FFFF
    large_webp = webp[:21] + struct.pack("<I", bits) + webp[25:]
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + b"\xff\xff\xff" * 2
    animation = b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas
    bmp = bytearray(encoded(smooth(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    return {
        "png": png_bomb(30_000, 30_000),
        "gif": gif_screen + image,
        "frame.gif": gif_frame + image,
        "jpg": bytes(jpeg),
        "tif": tiff,
        "webp": large_webp,
        "animation.webp": animation,
        "bmp": bytes(bmp),
    }
