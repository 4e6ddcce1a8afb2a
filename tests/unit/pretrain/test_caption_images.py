"""`vlmoe caption` on image files of every kind: each has a caption or a reason."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageCms, ImageDraw

from data_pipeline.common.errors import ConfigError, DataError
from pretrain.evaluate.caption_files import caption_command
from tests.support.shape_dataset import ShapeDataset
from tests.unit.pretrain.evaluate_support import RunFolder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shapes: ShapeDataset) -> Path:
    return RunFolder(tmp_path_factory.mktemp("caption") / "run", shapes).path


def save(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(
    format: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (60, 40), **options: object
) -> bytes:
    image = Image.new("RGB", size, "white")
    width, height = size
    ImageDraw.Draw(image).ellipse([0, 0, width // 2, height // 2], fill="red")
    return save(image.convert(mode), format, **options)


def frames(format: str) -> bytes:
    images = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    return save(images[0], format, save_all=True, append_images=images[1:])


def sixteen_bits() -> bytes:
    image = Image.new("I;16", (32, 32))
    for x in range(32):
        image.putpixel((x, x), 2000 * x)
    return save(image, "PNG")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


def with_profile() -> bytes:
    return picture(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


def huge_png(end: bytes = b"") -> bytes:
    """A header of 60,000 x 60,000 pixels, without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + end


READABLE: dict[str, Callable[[], bytes]] = {
    "UPPER.JPG": picture,
    "noext": picture,
    "a space (1).jpg": picture,
    "-dash.jpg": picture,
    "über–日本.jpg": picture,
    "of another format.png": picture,
    "progressive.jpg": lambda: picture(progressive=True),
    "cmyk.jpg": lambda: picture(mode="CMYK"),
    "profile.jpg": with_profile,
    "turned.jpg": turned,
    "grey.png": lambda: picture("PNG", "L"),
    "grey and alpha.png": lambda: picture("PNG", "LA"),
    "palette.png": lambda: picture("PNG", "P"),
    "two colors.png": lambda: picture("PNG", "1"),
    "sixteen bits.png": sixteen_bits,
    "transparent.png": lambda: save(Image.new("RGBA", (64, 64), (255, 0, 0, 0)), "PNG"),
    "one pixel.png": lambda: picture("PNG", size=(1, 1)),
    "row.png": lambda: picture("PNG", size=(20000, 10)),
    "column.jpg": lambda: picture(size=(10, 20000)),
    "frames.gif": lambda: frames("GIF"),
    "frames.webp": lambda: frames("WEBP"),
    "bitmap.bmp": lambda: picture("BMP"),
    "tagged.tif": lambda: picture("TIFF"),
    "anymap.ppm": lambda: picture("PPM"),
    "jpeg2000.jp2": lambda: picture("JPEG2000"),
}

UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "photo.heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "HEIC|its content"),
    "photo.avif": (lambda: b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(200), "AVIF|its content"),
    "x.jxl": (lambda: b"\xff\x0a" + bytes(200), "JPEG XL files are not supported; convert"),
    "icon.svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG .*; convert"),
    "doc.pdf": (lambda: b"%PDF-1.4\n", "PDF files are not supported; convert"),
    "empty.jpg": (lambda: b"", "it is empty"),
    "cut.jpg": (lambda: picture(size=(400, 400))[:3000], "truncated"),
    "cut.png": (lambda: picture("PNG", size=(400, 400))[:900], "truncated"),
    "html.jpg": (lambda: b"<!DOCTYPE html><title>404</title>", "begins with b'<!DOCTYPE ht'"),
    "video.mp4": (lambda: b"\0\0\0\x18ftypisom" + bytes(200), "expected JPEG, PNG"),
    "header.png": (huge_png, "truncated: its header is incomplete after 33 bytes"),
    "huge.png": (lambda: huge_png(b"\0\0\0\0IEND\xae\x42\x60\x82"), "60,?000"),
    "header.gif": (lambda: frames("GIF")[:11], "a GIF without a frame"),
    "header.jpg": (lambda: picture()[:30], "truncated: its header is incomplete"),
}


def test_every_file_has_its_caption_or_its_reason(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {name: make() for name, make in READABLE.items()}
    contents |= {name: make() for name, (make, _) in UNREADABLE.items()}
    paths = [tmp_path / name for name in sorted(contents)]
    for path in paths:
        path.write_bytes(contents[path.name])
    with pytest.raises(DataError) as raised:
        caption_command(run_dir, paths)

    captioned = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert captioned == [str(path) for path in paths if path.name in READABLE]
    first, *reasons = str(raised.value).splitlines()
    assert first == f"{len(UNREADABLE)} of {len(paths)} images could not be read:"
    names = [path.name for path in paths if path.name in UNREADABLE]
    for name, reason in zip(names, reasons, strict=True):
        assert re.fullmatch(
            rf"  {re.escape(str(tmp_path))}/{name}: .*({UNREADABLE[name][1]}).*", reason
        )


def test_captions_depend_on_the_image(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{color}.png" for color in ("red", "green", "blue", "black", "white")]
    for path in paths:
        Image.new("RGB", (48, 48), path.stem).save(path)
    caption_command(run_dir, paths)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.partition(".png: ")[2] for line in lines}) > 1


@pytest.mark.parametrize("name", ["nowhere", "empty", "run/checkpoints", "run/checkpoints/step"])
def test_other_folders_than_those_of_runs_are_refused(
    run_dir: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").symlink_to(run_dir)
    with pytest.raises(ConfigError, match=f"{name} is not a run folder: .*config.yaml") as raised:
        caption_command(tmp_path / name, [tmp_path / "x.png"])
    hint = f"the folder of its run is {tmp_path / 'run'}"
    assert str(raised.value).endswith(hint) == name.startswith("run/")
