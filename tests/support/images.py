"""Synthetic images, and image files of all formats, encoded with Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps


def gradient_image(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    """An image that lossy formats change little: a linear gradient in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    channel_values = [
        x * 240 / width,
        y * 200 / height,
        255 - x * 120 / width - y * 60 / height,
        40 + x * 150 / width,
    ]
    return np.stack(channel_values[:channels], axis=-1).clip(0, 255).astype(np.uint8)


def synthetic_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image with the statistics of a photograph: a 1/f spectrum, edges and thin lines."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    waves = rng.normal(size=(2, 3, *frequency.shape))
    planes = [
        np.fft.irfft2((a + 1j * b) / frequency, (height, width))
        for a, b in zip(*waves, strict=True)
    ]
    luminance, red, blue = (plane / plane.std() for plane in planes)
    channels = [0.9 * luminance + 0.3 * red, luminance, 0.9 * luminance + 0.3 * blue]
    image = (128 + 45 * np.stack(channels, axis=-1)).clip(0, 255).astype(np.uint8)

    for _ in range(25):
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        (x0, x1), (y0, y1) = rng.integers(0, width, 2).tolist(), rng.integers(0, height, 2).tolist()
        cv2.line(image, (x0, y0), (x1, y1), color, int(rng.integers(1, 6)), cv2.LINE_AA)
        cv2.circle(image, (x1, y0), int(rng.integers(5, height // 6 + 6)), color, 2, cv2.LINE_AA)
    return image


def encode_image(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """An image file in one of Pillow's formats."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode_with_pillow(data: bytes) -> np.ndarray:
    """Pillow's pixels after applying the orientation: uint8 RGB, or RGBA if not opaque."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return pixels[..., :3] if pixels.shape[2] == 4 and pixels[..., 3].min() == 255 else pixels


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int) -> bytes:
    """A valid PNG of one color, compressed to a few bytes per row."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(
        compressor.compress(row * min(64, height - top)) for top in range(0, height, 64)
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", body + compressor.flush())
        + png_chunk(b"IEND", b"")
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, dB; infinite if they are equal."""
    mse = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


def exif_block(orientation: int, *, big_endian: bool = False) -> bytes:
    """An EXIF block with a few tags, like those of cameras."""
    tags = Image.Exif()
    tags.endian = ">" if big_endian else "<"
    tags[0x010F], tags[0x0112], tags[0x0131] = "a camera", orientation, "its program"
    return tags.tobytes()


def palette_image(transparent: bool) -> Image.Image:
    """A gradient in 16 palette colors; optionally, one of them is transparent."""
    image = Image.fromarray(gradient_image()).quantize(16)
    if transparent:
        image.info["transparency"] = 3
    return image


def sample_image_files() -> dict[str, bytes]:
    """A small image file of every format and variant, by a description."""
    gray, large = gradient_image()[..., 0], synthetic_photo(61, 93)
    return {
        "png rgb": encode_image(gradient_image(), "PNG"),
        "png rgba": encode_image(gradient_image(channels=4), "PNG"),
        "png gray": encode_image(gray, "PNG"),
        "png gray alpha": encode_image(
            Image.fromarray(gradient_image(channels=4)).convert("LA"), "PNG"
        ),
        "png 1 bit": encode_image(Image.fromarray(gray).convert("1"), "PNG"),
        "png palette": encode_image(palette_image(False), "PNG"),
        "png palette, one color transparent": encode_image(
            palette_image(True), "PNG", transparency=3
        ),
        "png palette, alpha by color": encode_image(
            palette_image(False), "PNG", transparency=bytes(range(0, 255, 16))
        ),
        "png rgb, one color transparent": encode_image(
            gradient_image(), "PNG", transparency=tuple(gradient_image()[3, 4].tolist())
        ),
        "bmp": encode_image(gradient_image(), "BMP"),
        "bmp palette": encode_image(palette_image(False), "BMP"),
        "bmp 1 bit": encode_image(Image.fromarray(gray).convert("1"), "BMP"),
        "gif": encode_image(palette_image(False), "GIF"),
        "gif transparent": encode_image(palette_image(True), "GIF", transparency=3),
        "tiff": encode_image(gradient_image(), "TIFF"),
        "tiff rgba": encode_image(gradient_image(channels=4), "TIFF"),
        "tiff lzw": encode_image(gradient_image(), "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode_image(gradient_image(), "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode_image(gradient_image(48, 64), "TIFF", compression="jpeg"),
        "tiff packbits": encode_image(palette_image(False), "TIFF", compression="packbits"),
        "tiff cmyk": encode_image(
            Image.fromarray(gradient_image()).convert("CMYK"), "TIFF", compression="tiff_lzw"
        ),
        "tiff fax": encode_image(Image.fromarray(gray).convert("1"), "TIFF", compression="group4"),
        "webp lossless": encode_image(gradient_image(), "WEBP", lossless=True),
        "webp lossless alpha": encode_image(
            gradient_image(channels=4), "WEBP", lossless=True, exact=True
        ),
        "webp": encode_image(synthetic_photo(90, 60), "WEBP", quality=80),
        "webp alpha": encode_image(gradient_image(60, 90, channels=4), "WEBP", quality=80),
        "jpeg 4:2:0": encode_image(large, "JPEG", quality=85, subsampling=2),
        "jpeg 4:2:2": encode_image(large, "JPEG", quality=85, subsampling=1),
        "jpeg 4:4:4": encode_image(large, "JPEG", quality=85, subsampling=0),
        "jpeg gray": encode_image(large[..., 0], "JPEG", quality=85),
        "jpeg progressive": encode_image(large, "JPEG", quality=85, progressive=True),
        "jpeg with restart markers": encode_image(large, "JPEG", quality=85, restart_marker_rows=1),
        "jpeg in rgb": encode_image(large, "JPEG", quality=85, keep_rgb=True),
        "jpeg cmyk": encode_image(Image.fromarray(large).convert("CMYK"), "JPEG", quality=85),
        "ppm": encode_image(gradient_image(), "PPM"),
        "pgm": encode_image(gray, "PPM"),
        "pbm": encode_image(Image.fromarray(gray).convert("1"), "PPM"),
        "jpeg 2000": encode_image(gradient_image(), "JPEG2000"),
        "jpeg 2000 codestream": encode_image(gradient_image(), "JPEG2000", no_jp2=True),
        "avif": encode_image(gradient_image(), "AVIF", speed=10),
        "avif alpha": encode_image(gradient_image(channels=4), "AVIF", speed=10),
        "jpeg with comment": encode_image(large, "JPEG", comment=b"Exif, ff d8 and other words"),
    }


def image_bombs() -> dict[str, bytes]:
    """Small files that need gigabytes when decoded: each declares 30,000 x 30,000 pixels, or the
    maximum of its format."""
    jpeg = bytearray(encode_image(gradient_image(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)

    bmp = bytearray(encode_image(gradient_image(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)

    return {
        "png": png_bomb(30_000, 30_000),
        "gif": _gif_bomb(screen_side=65535),
        "frame.gif": _gif_bomb(screen_side=1),
        "jpg": bytes(jpeg),
        "tif": _tiff_bomb(),
        "webp": _webp_bomb(),
        "animation.webp": _webp_animation_bomb(),
        "bmp": bytes(bmp),
        "ppm": b"P6 30000 30000 255\n" + bytes(100),
        "jp2": _jp2_bomb(),
        "avif": encode_image(gradient_image(), "AVIF", speed=10).replace(
            struct.pack(">II", 30, 20), struct.pack(">II", 13_000, 13_000), 1
        ),
    }


def _jp2_bomb() -> bytes:
    data = bytearray(encode_image(gradient_image(), "JPEG2000"))
    box, size = data.index(b"ihdr") + 4, data.index(b"\xff\x4f\xff\x51") + 8
    data[box : box + 8] = data[size : size + 8] = struct.pack(">II", 30_000, 30_000)
    return bytes(data)


def _gif_bomb(screen_side: int) -> bytes:
    screen = struct.pack("<HHBBB", screen_side, screen_side, 0x80, 0, 0) + bytes(6)
    lzw = b"\x02\x02\x4c\x01\x00"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + lzw + b";"
    return b"GIF89a" + screen + frame


def _tiff_bomb() -> bytes:
    tags = {256: 30_000, 257: 30_000, 258: 8, 259: 5, 262: 1, 273: 8, 277: 1, 278: 30_000, 279: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    offset = struct.pack("<I", 58)
    return b"II*\0" + offset + bytes(50) + struct.pack("<H", len(tags)) + entries + bytes(4)


def _webp_bomb() -> bytes:
    webp = encode_image(gradient_image(), "WEBP", lossless=True)
    bits = int.from_bytes(webp[21:25], "little") | 0xFFF_FFFF
    return webp[:21] + struct.pack("<I", bits) + webp[25:]


def _webp_animation_bomb() -> bytes:
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + b"\xff\xff\xff" * 2
    return b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas
