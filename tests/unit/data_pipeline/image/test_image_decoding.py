"""Image decoding and headers, compared with Pillow."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import DataError
from data_pipeline.content.image.decoding import check_pixels, decode_image
from data_pipeline.content.image.header import read_header
from tests.support.images import (
    decode_with_pillow,
    encode_image,
    exif_block,
    gradient_image,
    palette_image,
    png_bomb,
    png_chunk,
    sample_image_files,
    synthetic_photo,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

FILES = sample_image_files()


@pytest.mark.parametrize("name", FILES)
def test_decoded_pixels_equal_pillow(name: str) -> None:
    pixels, expected = decode_image(FILES[name]), decode_with_pillow(FILES[name])
    header = read_header(FILES[name])
    assert (header.height, header.width) == expected.shape[:2]
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    # Versions of lossy decoders differ in rounding, by one or two.
    tolerance = 2 if name.startswith(("jpeg", "webp")) and "lossless" not in name else 0
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_cmyk_and_ycck() -> None:
    """CMYK as Photoshop writes it, and YCCK, whose CMY channels are stored as YCbCr."""
    data = FILES["jpeg cmyk"]
    marker = data.index(b"Adobe")
    assert np.abs(decode_image(data).astype(int) - synthetic_photo(61, 93)).mean() < 6
    ycck = data[: marker + 11] + b"\2" + data[marker + 12 :]
    np.testing.assert_array_equal(decode_image(ycck), decode_with_pillow(ycck))
    assert np.abs(decode_image(ycck).astype(int) - decode_image(data)).mean() > 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grayscale_is_scaled_not_clipped(kind: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    expected = np.round(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(
        decode_image(encode_image(deep, kind)), np.repeat(expected[..., None], 3, axis=-1)
    )
    dark = (deep // 500).astype(np.uint16)  # 0..131 of 65535 is nearly black
    assert decode_image(encode_image(dark, kind)).max() == 1


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_color(channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 30, 20, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )
    pixels = decode_image(data)
    np.testing.assert_array_equal(pixels, decode_with_pillow(data))
    assert np.abs(pixels.astype(int) - deep / 257).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_kept_unless_opaque(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = gradient_image(channels=4)
    decoded = decode_image(encode_image(pixels, kind, **options))
    np.testing.assert_array_equal(decoded, pixels)

    pixels[..., 3] = 255
    decoded = decode_image(encode_image(pixels, kind, **options))
    np.testing.assert_array_equal(decoded, pixels[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    pixels = gradient_image(24, 40)
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    for big_endian in (False, True):
        exif = exif_block(orientation, big_endian=big_endian)
        data = encode_image(pixels, kind, exif=exif, **options)
        decoded, expected = decode_image(data), decode_with_pillow(data)
        assert decoded.shape == expected.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
        assert np.abs(decoded.astype(int) - expected).max() <= (2 if kind == "JPEG" else 0)
        header = read_header(data)
        assert (header.height, header.width) == expected.shape[:2]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of corrupt EXIF
def test_exif_at_unusual_offsets_or_in_unusual_encodings() -> None:
    pixels = gradient_image(24, 40)
    late = encode_image(
        pixels,
        "JPEG",
        exif=exif_block(6),
        icc_profile=bytes(150_000),
        comment=b"c" * 60_000,
    )
    exif_start = late.index(b"Exif") - 4
    length = 2 + int.from_bytes(late[exif_start + 2 : exif_start + 4], "big")
    last = late.index(b"\xff\xdb")
    late = (
        late[:exif_start]
        + late[exif_start + length : last]
        + late[exif_start : exif_start + length]
        + late[last:]
    )
    assert late.index(b"Exif") > 200_000

    short, long = (struct.pack("<HHI", 0x0112, kind, 1) for kind in (3, 4))
    unusual = encode_image(pixels, "JPEG", exif=exif_block(6).replace(short, long))
    xmp = encode_image(pixels, "JPEG", xmp=b'<x:xmpmeta><rdf tiff:Orientation="8"/></x:xmpmeta>')
    for data in (late, unusual, xmp):
        decoded, expected = decode_image(data), decode_with_pillow(data)
        assert decoded.shape == expected.shape == (40, 24, 3)
        assert np.abs(decoded.astype(int) - expected).max() <= 2

    corrupt = encode_image(pixels, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(corrupt).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_first_frame_of_an_animation(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode_image(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded, decode_with_pillow(data))
    np.testing.assert_array_equal(decoded[4, 4, :3], (255, 0, 0))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a caption, by mistake",
        b"<html>404</html>",
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"GIF89a\x01\0\x01\0\0\0\0;",
        b"RIFF\x08\x00\x00\x00WEBP",
        b"RIFF\xff\xff\xff\x00WEBPVP8L",
        b"BM",
        b"II*\0",
        b"II*\0" + bytes(30),
    ],
)
def test_file_that_is_not_an_image(data: bytes) -> None:
    for read in (decode_image, read_header):
        with pytest.raises(DataError) as caught:
            read(data)
        assert caught.value.slug == "corrupt-image"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_truncated_file_is_rejected(kind: str, fraction: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode_image(noise, kind)
    with pytest.raises(DataError) as caught:
        decode_image(data[: int(len(data) * fraction)])
    assert caught.value.slug == "corrupt-image"


@pytest.mark.parametrize("name", ["png rgb", "png palette", "png gray alpha"])
def test_png_with_any_corrupt_byte_is_rejected(name: str) -> None:
    data = FILES[name]
    for position in range(len(data)):
        corrupt = bytearray(data)
        corrupt[position] ^= 0x10
        with pytest.raises(DataError):
            decode_image(bytes(corrupt))


def test_decompression_bomb_is_rejected() -> None:
    with pytest.raises(DataError, match=r"60000 x 60000 pixels.* 67,108,864"):
        decode_image(png_bomb(60_000, 60_000))


def test_max_pixels() -> None:
    for kind in FORMATS:
        data = encode_image(gradient_image(), kind)
        with pytest.raises(DataError, match=r"30 x 20 pixels.* 599"):
            decode_image(data, max_pixels=599)
        assert decode_image(data, max_pixels=600).shape[:2] == (20, 30)


def test_gif_frame_larger_than_its_screen() -> None:
    data = bytearray(encode_image(palette_image(False), "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    header = read_header(bytes(data))
    assert (header.width, header.height) == (30, 20)
    assert decode_image(bytes(data)).shape == (20, 30, 3)


def test_tiff_with_huge_tiles_is_rejected() -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: 65536, 323: 65536, 324: 8, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(100)
    with pytest.raises(DataError, match="tiles of 65536 x 65536"):
        decode_image(data)


def test_palette_image_without_palette() -> None:
    """Pillow raises an AssertionError."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(72)))
        + png_chunk(b"IEND", b"")
    )
    with pytest.raises(DataError) as caught:
        decode_image(data)
    assert caught.value.slug == "corrupt-image"
    assert isinstance(caught.value.__cause__, AssertionError)


def test_jpeg_with_thousands_of_scans_is_rejected() -> None:
    data = encode_image(synthetic_photo(64, 64), "JPEG", progressive=True)
    header = read_header(data)
    assert 5 < header.scans < 20
    check_pixels(header, 64 * 64)
    scan = data.rindex(b"\xff\xda")
    many = data[:-2] + data[scan:-2] * 5000 + b"\xff\xd9"
    with pytest.raises(DataError, match=r"50\d\d scans"):
        decode_image(many, max_pixels=64 * 64)
