"""Less usual image formats: recognized by signature, decoded or refused with a remedy."""

from __future__ import annotations

import builtins
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import DataError
from data_pipeline.content.image import decode_image, formats, image_format, read_header
from data_pipeline.preparing.importers.folder import Folder
from data_pipeline.preparing.importers.load_samples import load_samples
from data_pipeline.preparing.importers.records import Record, SkippedRow
from tests.support.images import encode_image, exif_block, gradient_image, psnr, sample_image_files

NAMES = {"jpeg": "jpg", "tiff": "tif", "pgm": "ppm", "pbm": "ppm", "jpeg 2000": "jp2"}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
UNSUPPORTED = {
    "jxl": (b"\xff\x0a" + bytes(64), "JPEG XL files are not supported; convert them"),
    "psd": (b"8BPS" + bytes(64), "Photoshop files"),
    "pdf": (b"%PDF-1.7", "PDF files"),
    "svg": (b"<svg xmlns=''/>", "SVG files"),
}


@pytest.mark.parametrize("name", sample_image_files())
def test_write_accepts_what_the_loader_decodes(name: str, tmp_path: Path) -> None:
    data = sample_image_files()[name]
    kind = "jpeg 2000" if name.startswith("jpeg 2000") else name.split()[0]
    assert image_format(data) == NAMES.get(kind, kind)
    (sample,) = write(tmp_path, data)
    assert isinstance(sample, dict) and sample[image_format(data)] == data


def write(folder: Path, data: bytes, name: str = "a.jpg") -> list[dict[str, object] | SkippedRow]:
    """The samples of a folder with one image."""
    (folder / name).write_bytes(data)
    (folder / "a.txt").write_text("a cat")
    source = Folder(folders=(str(folder),))
    return list(load_samples([r for r in source() if isinstance(r, Record)], source, decode=True))


@pytest.mark.parametrize(
    ("brands", "expected"),
    [
        ([b"avif", b"mif1", b"miaf"], "avif"),
        ([b"mif1", b"avif"], "avif"),
        ([b"mif1", b"heic"], "heic"),
        ([b"heix"], "heic"),
        ([b"isom", b"mp42"], ""),
        ([b"qt  "], ""),
    ],
)
def test_brands(brands: list[bytes], expected: str) -> None:
    body = brands[0] + bytes(4) + b"".join(brands[1:])
    data = struct.pack(">I", 8 + len(body)) + b"ftyp" + body
    assert image_format(data + b"avif" * 9) == expected


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_formats_are_named(name: str, tmp_path: Path) -> None:
    data, message = UNSUPPORTED[name]
    assert image_format(data) == name
    with pytest.raises(DataError, match=message) as error:
        read_header(data)
    assert error.value.slug == "unsupported-format"
    (skipped,) = write(tmp_path, data)
    assert isinstance(skipped, SkippedRow)
    assert skipped.reason == "unsupported-format" and "convert them" in skipped.detail


@pytest.fixture
def no_decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if pillow-heif and Pillow's AVIF decoder were not installed."""
    real_import = builtins.__import__

    def fail(name: str, *args: Any) -> Any:
        if name == "pillow_heif" or (name == "PIL" and "AvifImagePlugin" in (args[2] or ())):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", fail)
    formats._problem.cache_clear()
    yield
    formats._problem.cache_clear()


@pytest.mark.usefixtures("no_decoders")
def test_missing_decoders(tmp_path: Path) -> None:
    (skipped,) = write(tmp_path, HEIC, "a.heic")
    assert isinstance(skipped, SkippedRow) and skipped.reason == "unsupported-format"
    assert "pip install 'vlmoe[heif]'" in skipped.detail
    with pytest.raises(DataError, match=r"AVIF files need Pillow 11\.3"):
        decode_image(encode_image(gradient_image(), "AVIF", speed=10))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_heic(orientation: int, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels, file = gradient_image(64, 96), io.BytesIO()
    image = pillow_heif.from_pillow(Image.fromarray(pixels))
    image.save(file, quality=90, exif=exif_block(orientation))
    data = file.getvalue()
    expected = np.rot90(pixels, {1: 0, 3: 2, 6: 3}[orientation])
    header = read_header(data)
    assert (header.height, header.width, header.memory_factor) == (*expected.shape[:2], 2)
    assert psnr(decode_image(data), expected) > 30
    (sample,) = write(tmp_path, data)
    assert isinstance(sample, dict) and sample["heic"] == data
    with pytest.raises(DataError, match="more than the limit") as error:
        decode_image(data, max_pixels=64 * 96)
    assert error.value.slug == "corrupt-image"
    with pytest.raises(DataError):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_avif(orientation: int) -> None:
    pixels = gradient_image(64, 96)
    data = encode_image(pixels, "AVIF", quality=95, speed=10, exif=exif_block(orientation))
    header = read_header(data)
    assert (header.width > header.height) == (orientation < 5)
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = orientation
    from PIL import ImageOps

    assert psnr(decode_image(data), np.asarray(ImageOps.exif_transpose(turned))) > 30


def test_16_bit_pgm_is_scaled() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    for values in (deep, deep // 500):
        data = b"P5\n# a comment\n30 20\n65535\n" + values.astype(">u2").tobytes()
        expected = np.round(values / 257).astype(np.uint8)
        np.testing.assert_array_equal(decode_image(data)[..., 0], expected)


def test_jpeg_2000_whose_codestream_is_larger_is_refused() -> None:
    data = bytearray(encode_image(gradient_image(), "JPEG2000"))
    start = data.index(b"\xff\x4f\xff\x51") + 8
    for offset, message in ((0, "codestream differs"), (16, "but tiles of 60000 x 60000")):
        changed = data.copy()
        changed[start + offset : start + offset + 8] = struct.pack(">II", 60_000, 60_000)
        with pytest.raises(DataError, match=message) as error:
            read_header(bytes(changed))
        assert error.value.slug == "corrupt-image"
