"""Pictures are made with Pillow, which serves as the oracle, and decoded with ours."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import DataError
from data_pipeline.content.images import check_pixels, decode, decode_pixels, read_header
from tests.support.pictures import (
    by_pillow,
    encoded,
    exif,
    palette,
    photo,
    picture_files,
    png_bomb,
    png_chunk,
    psnr,
    smooth,
)

EVERY_KIND = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


FILES = picture_files()


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_what_pillow_gives(name: str) -> None:
    found, expected = decode(FILES[name]), by_pillow(FILES[name])
    header = read_header(FILES[name])
    assert (header.height, header.width) == expected.shape[:2]
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    # Lossy decoders may round differently, by one or two, in different versions of their libraries.
    tolerance = 2 if name.startswith(("jpeg", "webp")) and "lossless" not in name else 0
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance


def test_ink_pictures_keep_their_colors() -> None:
    """CMYK as Photoshop writes it, and YCCK, whose three colors are stored as lightness and
    color."""
    data = FILES["jpeg cmyk"]
    marker = data.index(b"Adobe")
    assert np.abs(decode(data).astype(int) - photo(61, 93)).mean() < 6
    ycck = data[: marker + 11] + b"\2" + data[marker + 12 :]
    np.testing.assert_array_equal(decode(ycck), by_pillow(ycck))
    assert np.abs(decode(ycck).astype(int) - decode(data)).mean() > 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(kind: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    expected = np.round(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(
        decode(encoded(deep, kind)), np.repeat(expected[..., None], 3, axis=-1)
    )
    dark = (deep // 500).astype(np.uint16)  # 0..131 of 65535 is black, not half gray
    assert decode(encoded(dark, kind)).max() == 1


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_of_color(channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 30, 20, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )
    found = decode(data)
    np.testing.assert_array_equal(found, by_pillow(data))
    assert np.abs(found.astype(int) - deep / 257).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_kept_and_a_useless_alpha_channel_dropped(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = smooth(channels=4)
    np.testing.assert_array_equal(decode(encoded(pixels, kind, **options)), pixels)
    pixels[..., 3] = 255
    np.testing.assert_array_equal(decode(encoded(pixels, kind, **options)), pixels[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(kind: str, orientation: int) -> None:
    pixels = smooth(24, 40)
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    for big_endian in (False, True):
        data = encoded(pixels, kind, exif=exif(orientation, big_endian=big_endian), **options)
        found, expected = decode(data), by_pillow(data)
        assert found.shape == expected.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
        assert np.abs(found.astype(int) - expected).max() <= (2 if kind == "JPEG" else 0)
        header = read_header(data)
        assert (header.height, header.width) == expected.shape[:2]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on damaged EXIF
def test_exif_is_found_wherever_it_stands_and_its_oddities_are_left_to_pillow() -> None:
    pixels = smooth(24, 40)
    late = encoded(pixels, "JPEG", exif=exif(6), icc_profile=bytes(150_000), comment=b"c" * 60_000)
    moved = late.index(b"Exif") - 4
    length = 2 + int.from_bytes(late[moved + 2 : moved + 4], "big")
    last = late.index(b"\xff\xdb")
    late = late[:moved] + late[moved + length : last] + late[moved : moved + length] + late[last:]
    assert late.index(b"Exif") > 200_000
    short, long = (struct.pack("<HHI", 0x0112, kind, 1) for kind in (3, 4))
    odd = encoded(pixels, "JPEG", exif=exif(6).replace(short, long))
    xmp = encoded(pixels, "JPEG", xmp=b'<x:xmpmeta><rdf tiff:Orientation="8"/></x:xmpmeta>')
    for data in (late, odd, xmp):
        found, expected = decode(data), by_pillow(data)
        assert found.shape == expected.shape == (40, 24, 3)
        assert np.abs(found.astype(int) - expected).max() <= 2
    broken = encoded(pixels, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(broken).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_the_first_picture_of_an_animation_is_taken(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    found = decode(data)
    np.testing.assert_array_equal(found, by_pillow(data))
    np.testing.assert_array_equal(found[4, 4, :3], (255, 0, 0))


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
def test_what_is_no_picture_is_named_as_one_bad_sample(data: bytes) -> None:
    for read in (decode, read_header):
        with pytest.raises(DataError) as caught:
            read(data)
        assert caught.value.slug == "bad-image"


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_picture_is_never_taken_for_whole(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", ["png rgb", "png palette", "png gray alpha"])
def test_a_png_with_any_byte_changed_is_refused(name: str) -> None:
    data = FILES[name]
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x10
        with pytest.raises(DataError):
            decode(bytes(changed))


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(DataError, match="60000 x 60000 pixels, more than"):
        decode(png_bomb(60_000, 60_000))
    for kind in EVERY_KIND:
        with pytest.raises(DataError, match="more than the 599"):
            decode(encoded(smooth(), kind), max_pixels=599)
        assert decode(encoded(smooth(), kind), max_pixels=600).shape[:2] == (20, 30)


def test_a_gif_that_grows_beyond_its_screen_is_measured_as_it_will_be() -> None:
    data = bytearray(encoded(palette(False), "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    header = read_header(bytes(data))
    assert (header.width, header.height) == (30, 20)
    assert decode(bytes(data)).shape == (20, 30, 3)


def test_a_tiff_with_tiles_far_larger_than_itself_is_refused() -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: 65536, 323: 65536, 324: 8, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(100)
    with pytest.raises(DataError, match="tiles of 65536 x 65536"):
        decode(data)


def test_a_palette_picture_without_its_palette_is_one_bad_sample() -> None:
    """Here Pillow fails by an assertion of its own."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(72)))
        + png_chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        decode(data)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_takes_minutes() -> None:
    data = encoded(photo(64, 64), "JPEG", progressive=True)
    header = read_header(data)
    assert 5 < header.scans < 20
    check_pixels(header, 64 * 64)
    scan = data.rindex(b"\xff\xda")
    many = data[:-2] + data[scan:-2] * 5000 + b"\xff\xd9"
    with pytest.raises(DataError, match=r"progressive JPEG of 50\d\d scans"):
        decode(many, max_pixels=64 * 64)


@pytest.mark.parametrize("options", [{"subsampling": 2}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize(("height", "width"), [(256, 384), (257, 383), (250, 390)])
def test_a_jpeg_can_come_reduced(height: int, width: int, options: dict[str, Any]) -> None:
    """Each pixel of the smaller picture is nearly the mean of a square of the whole one."""
    data = encoded(photo(height, width), "JPEG", quality=90, **options)
    for at_least, expected in [
        ((31, 31), 8),
        ((33, 33), 4),
        ((100, 100), 2),
        ((129, 1), 1),
        ((9999, 9999), 1),
    ]:
        assert reduction_checked(data, at_least) == expected


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_jpeg_comes_reduced_where_it_divides(orientation: int) -> None:
    """Where it does not, the pixels would lie beside where they are expected."""
    for (height, width), expected in [
        ((256, 384), 8),
        ((260, 388), 4),
        ((258, 386), 2),
        ((257, 384), 1),
    ]:
        data = encoded(photo(height, width), "JPEG", quality=90, exif=exif(orientation))
        assert reduction_checked(data, (30, 30)) == expected


def reduction_checked(data: bytes, at_least: tuple[int, int]) -> int:
    """By what a picture comes reduced, after a comparison with the means of the whole one."""
    header, whole = read_header(data), decode(data)
    pixels, reduced = decode_pixels(data, header, at_least)
    assert pixels.shape == (-(-header.height // reduced), -(-header.width // reduced), 3)
    rows, columns = header.height // reduced, header.width // reduced
    squares = whole[: rows * reduced, : columns * reduced].reshape(
        rows, reduced, columns, reduced, 3
    )
    assert psnr(pixels[:rows, :columns], squares.mean(axis=(1, 3))) > 30  # beside by one: about 20
    return reduced


def test_only_jpegs_come_reduced() -> None:
    for kind in EVERY_KIND:
        data = encoded(smooth(64, 96), kind)
        pixels, reduced = decode_pixels(data, read_header(data), (30, 40))
        assert (pixels.shape[:2], reduced) == (((32, 48), 2) if kind == "JPEG" else ((64, 96), 1))
