"""Pictures are made with Pillow, which serves as the oracle, and decoded with ours."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import DataError
from data_pipeline.content.images import decode


def smooth(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    """A picture that lossy formats change little: gentle ramps, each channel another."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 8, y * 10, 255 - x * 4 - y * 3, 40 + x * 5]
    return np.stack(planes[:channels], axis=-1).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_come_back_exactly(kind: str, options: dict[str, Any]) -> None:
    pixels = smooth()
    np.testing.assert_array_equal(decode(encoded(pixels, kind, **options)), pixels)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
def test_lossy_formats_come_back_nearly_and_in_rgb_order(kind: str, options: dict[str, Any]) -> None:
    pixels = smooth()
    difference = np.abs(decode(encoded(pixels, kind, **options)).astype(int) - pixels)
    assert difference.mean() < 4  # red and blue exchanged would give about 90


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_kept_and_a_useless_alpha_channel_dropped(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = smooth(channels=4)
    np.testing.assert_array_equal(decode(encoded(pixels, kind, **options)), pixels)
    pixels[..., 3] = 255
    np.testing.assert_array_equal(decode(encoded(pixels, kind, **options)), pixels[..., :3])


def test_jpeg_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    pixels = smooth()
    turned = decode(encoded(pixels, "JPEG", quality=95, exif=exif))
    assert turned.shape == (30, 20, 3)
    assert np.abs(turned.astype(int) - np.rot90(pixels, -1)).mean() < 4


def test_grey_palette_cmyk_and_sixteen_bits_become_rgb() -> None:
    grey = smooth()[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode(encoded(grey, "PNG")), as_rgb)
    assert np.abs(decode(encoded(grey, "JPEG", quality=95)).astype(int) - as_rgb).mean() < 4
    np.testing.assert_array_equal(decode(encoded(grey.astype(np.uint16) * 257, "PNG")), as_rgb)

    file = io.BytesIO()
    Image.fromarray(smooth()).convert("CMYK").save(file, "JPEG", quality=95)
    assert np.abs(decode(file.getvalue()).astype(int) - smooth()).mean() < 6

    palette = Image.fromarray(grey).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=int(np.asarray(palette)[3, 4]))
    decoded = decode(file.getvalue())
    assert decoded.shape == (20, 30, 4)
    assert decoded[3, 4, 3] == 0 and decoded[..., 3].max() == 255


def test_the_first_picture_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode(file.getvalue())[4, 4, :3], (255, 0, 0))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a caption, by mistake",
        b"<html>404</html>",
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\x08\x00\x00\x00WEBP",
        b"RIFF\xff\xff\xff\x00WEBPVP8L",
        b"BM",
        b"II*\0",
        b"II*\0" + bytes(30),
    ],
)
def test_what_is_no_picture_is_named_as_one_bad_sample(data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        decode(data)
    assert caught.value.slug == "bad-image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_picture_is_never_taken_for_whole(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on damaged TIFF tags
def test_flipped_bytes_give_pixels_or_a_data_error_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    outcomes = set()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = encoded(smooth(), kind)
        for _ in range(60):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), 4):
                data[position] = rng.integers(256)
            try:
                outcomes.add(decode(bytes(data), max_pixels=1 << 16).shape[2] in (3, 4))
            except DataError as error:
                outcomes.add(error.slug)
    assert outcomes == {True, "bad-image"}


def test_a_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IEND", b""))
    ]
    with pytest.raises(DataError, match="60000 x 60000 pixels, more than"):
        decode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        with pytest.raises(DataError, match="more than the 599"):
            decode(encoded(smooth(), kind), max_pixels=599)
        assert decode(encoded(smooth(), kind), max_pixels=600).shape[:2] == (20, 30)
