"""Samples that try to execute code or to exhaust time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.yaml_file import parse_yaml
from data_pipeline.content.image import decode_image
from data_pipeline.content.sample_processor import SampleProcessor
from data_pipeline.samples import RawSample
from data_pipeline.settings import AugmentConfig
from tests.support.images import encode_image, gradient_image, image_bombs, png_bomb
from tests.support.launch import ROOT, clean_environment

BOMBS = image_bombs()
PNG = encode_image(gradient_image(), "PNG")


class CodePointTokenizer:
    """Encodes each character as its code point."""

    def encode_truncated(self, caption: str, max_length: int) -> tuple[list[int], bool]:
        return [1, *map(ord, caption[: max_length - 2]), 2], len(caption) > max_length - 2


def outcome(members: dict[str, bytes]) -> str:
    """`accepted`, or the slug of the error; fails if it takes too long."""
    sample_processor = SampleProcessor(
        image_size=16,
        context_length=8,
        caption_keys=("txt", "json:a"),
        caption_weights=(1.0, 1.0),
        augment=AugmentConfig(),
    )
    tokenizer: Any = CodePointTokenizer()
    start = time.process_time()
    try:
        sample_processor.process(RawSample("s.tar", "k", members), 0, tokenizer)
        result = "accepted"
    except DataError as error:
        assert len(str(error)) < 500
        result = error.slug
    assert time.process_time() - start < 2
    return result


@pytest.mark.parametrize("name", BOMBS)
def test_image_bombs_are_rejected_by_their_header(name: str) -> None:
    assert len(BOMBS[name]) < 150_000
    assert outcome({name.rpartition(".")[2]: BOMBS[name], "txt": b"x"}) == "corrupt-image"
    with pytest.raises(
        DataError, match=r"has \d{5,} x \d{5,} pixels, more than|Image size \(900000000 pixels\)"
    ):
        decode_image(BOMBS[name])


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"png": PNG, "txt": b"x"}, "accepted"),
        ({"png": PNG, "txt": b"x" * 10_000_000}, "caption-too-long"),
        ({"png": PNG, "txt": ("a" + "\u0301\u0323" * 49_000).encode()}, "accepted"),
        ({"png": PNG, "txt": ("a" + "\u0f73" * 98_000).encode()}, "accepted"),
        ({"png": PNG, "txt": "\u2581".encode() * 90_000}, "accepted"),
        ({"png": PNG, "json": b"[" * 10_000_000}, "invalid-json"),
        ({"png": PNG, "json": b'{"a":' * 600_000}, "invalid-json"),
        ({"png": PNG, "json": b'{"a": ' + b"9" * 4_000_000 + b"}"}, "invalid-json"),
        ({"png": PNG, "json": b'{"a": "' + b"x" * 10_000_000 + b'"}'}, "invalid-json"),
        ({"png": PNG, "json": b'{"a": [' + b'"x",' * 500_000 + b'"x"]}'}, "accepted"),
        ({"png": PNG, "txt": "\ud800".encode("utf-8", "surrogatepass")}, "invalid-text"),
        ({"png": PNG, "txt": b"\xff\xfe"}, "invalid-text"),
        ({"jpg": b"\x80\x04\x95pickled", "txt": b"x"}, "corrupt-image"),
        ({"pkl": b"\x80\x04\x95pickled", "txt": b"x"}, "no-image"),
        ({"png": PNG, "pkl": b"\x80\x04\x95pickled"}, "no-caption"),
    ],
)
def test_oversized_samples_are_processed_fast(members: dict[str, bytes], expected: str) -> None:
    assert outcome(members) == expected


def test_yaml_with_python_tags_is_rejected(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for tag in (
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"!!python/object/apply:subprocess.check_output [['touch', '{canary}']]",
        f"!!python/object/new:os.system ['touch {canary}']",
        "!!python/name:os.system",
        "!!python/module:os",
        f"!!python/object/apply:builtins.exec [\"open('{canary}', 'w')\"]",
        "!something {}",
    ):
        with pytest.raises(ConfigError, match=r"a run file.*YAML"):
            parse_yaml(f"data: {tag}", source="a run file")
    assert not canary.exists()


def test_yaml_alias_bomb_is_parsed_fast() -> None:
    """Each line refers nine times to the previous one; expanded it would be gigabytes."""
    lines = ["a0: &a0 lol"]
    for n in range(1, 12):
        aliases = ", ".join([f"*a{n - 1}"] * 9)
        lines.append(f"a{n}: &a{n} [{aliases}]")
    start = time.process_time()
    parse_yaml("\n".join(lines), source="a run file")
    assert time.process_time() - start < 1.0


MEASURE_MEMORY = """
import resource, sys
from data_pipeline.content.image import decode_image
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(decode_image(data).shape)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["PNG", "RGBA PNG", "GRAY PNG", "CMYK JPEG", "JPEG", "GIF", "CMYK TIFF", "WEBP"]
)
def test_memory_for_images_of_the_maximum_size(kind: str, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    mode, _, name = kind.rpartition(" ")
    side = 8192 if kind != "CMYK JPEG" else 5792
    image: Image.Image
    if mode == "GRAY":
        image = Image.fromarray(np.full((side, side), 30_000, np.uint16))
    else:
        image = Image.new(mode or "RGB", (side, side))
    options = {
        "JPEG": {"progressive": True},
        "TIFF": {"compression": "tiff_lzw"},
        "WEBP": {"method": 0},
    }.get(name, {})
    path = tmp_path / "large"
    path.write_bytes(encode_image(image, name, **options))  # type: ignore[arg-type]
    completed = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, str(path)],
        cwd=ROOT,
        env=clean_environment(),
        text=True,
        capture_output=True,
        timeout=120,
        check=True,
    )
    shape, mib = completed.stdout.splitlines()
    assert shape.startswith(f"({side}, {side}, ")
    assert float(mib) < 780  # under 1 GiB together with the libraries and torch


def test_highly_compressed_image_within_the_limits_is_accepted() -> None:
    """Its 4,096 x 4,096 pixels take 4 KB; photographs may have as many."""
    data = png_bomb(4096, 4096)
    assert len(data) < 4096
    assert outcome({"png": data, "txt": json.dumps("x").encode()}) == "accepted"
