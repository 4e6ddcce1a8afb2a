"""Samples that somebody made to run programs or to use up time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.yaml_file import parse_yaml
from data_pipeline.content.images import decode
from data_pipeline.content.recipe import Recipe
from data_pipeline.samples import RawSample
from data_pipeline.settings import AugmentConfig
from tests.support.launch import ROOT, clean_environment
from tests.support.pictures import encoded, picture_bombs, png_bomb, smooth

BOMBS = picture_bombs()


class Letters:
    def encode_clean(self, caption: str, max_length: int) -> list[int]:
        return [1, *map(ord, caption[: max_length - 2]), 2]


def outcome(members: dict[str, bytes]) -> str:
    """What becomes of a sample, and in well under a second."""
    recipe = Recipe(
        image_size=16,
        context_length=8,
        caption_keys=("txt", "json:a"),
        caption_weights=(1.0, 1.0),
        augment=AugmentConfig(),
    )
    start = time.process_time()
    try:
        recipe.make(RawSample("s.tar", "k", members), 0, Letters())  # type: ignore[arg-type]
        found = "good"
    except DataError as error:
        assert len(str(error)) < 500
        found = error.slug
    assert time.process_time() - start < 0.5
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_pictures_that_ask_for_gigabytes_are_refused_by_their_headers(name: str) -> None:
    assert len(BOMBS[name]) < 150_000
    assert outcome({name: BOMBS[name], "txt": b"x"}) == "bad-image"
    with pytest.raises(
        DataError, match=r"has \d{5,} x \d{5,} pixels, more than|Image size \(900000000 pixels\)"
    ):
        decode(BOMBS[name])


PICTURE = encoded(smooth(), "PNG")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"png": PICTURE, "txt": b"x"}, "good"),
        ({"png": PICTURE, "txt": b"x" * 10_000_000}, "caption-too-long"),
        ({"png": PICTURE, "txt": ("a" + "\u0301\u0323" * 49_000).encode()}, "good"),
        ({"png": PICTURE, "txt": ("a" + "\u0f73" * 98_000).encode()}, "good"),
        ({"png": PICTURE, "txt": "\u2581".encode() * 90_000}, "good"),
        ({"png": PICTURE, "json": b"[" * 10_000_000}, "bad-json"),
        ({"png": PICTURE, "json": b'{"a":' * 600_000}, "bad-json"),
        ({"png": PICTURE, "json": b'{"a": ' + b"9" * 4_000_000 + b"}"}, "bad-json"),
        ({"png": PICTURE, "json": b'{"a": "' + b"x" * 10_000_000 + b'"}'}, "bad-json"),
        ({"png": PICTURE, "json": b'{"a": [' + b'"x",' * 500_000 + b'"x"]}'}, "good"),
        ({"png": PICTURE, "txt": "\ud800".encode("utf-8", "surrogatepass")}, "bad-text"),
        ({"png": PICTURE, "txt": b"\xff\xfe"}, "bad-text"),
        ({"jpg": b"\x80\x04\x95pickled", "txt": b"x"}, "bad-image"),
        ({"pkl": b"\x80\x04\x95pickled", "txt": b"x"}, "no-image"),
        ({"png": PICTURE, "pkl": b"\x80\x04\x95pickled"}, "no-caption"),
    ],
)
def test_what_is_too_much_is_one_bad_sample_and_cheap(
    members: dict[str, bytes], expected: str
) -> None:
    assert outcome(members) == expected


def test_yaml_that_asks_for_python_is_refused(tmp_path: Path) -> None:
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
        with pytest.raises(ConfigError, match="not usable YAML"):
            parse_yaml(f"data: {tag}", source="a run file")
    assert not canary.exists()


def test_yaml_that_doubles_itself_costs_little() -> None:
    """Each line holds the one before nine times; written out it would be gigabytes."""
    lines = ["a0: &a0 lol"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)
    ]
    start = time.process_time()
    parse_yaml("\n".join(lines), source="a run file")
    assert time.process_time() - start < 1.0


MEMORY = """
import resource, sys
from data_pipeline.content.images import decode
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(decode(data).shape)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["PNG", "RGBA PNG", "GRAY PNG", "CMYK JPEG", "JPEG", "GIF", "CMYK TIFF", "WEBP"]
)
def test_the_largest_accepted_pictures_take_less_than_a_gibibyte(kind: str, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    mode, _, name = kind.rpartition(" ")
    side = 8192 if kind != "CMYK JPEG" else 5792
    picture: Image.Image
    if mode == "GRAY":
        picture = Image.fromarray(np.full((side, side), 30_000, np.uint16))
    else:
        picture = Image.new(mode or "RGB", (side, side))
    options = {
        "JPEG": {"progressive": True},
        "TIFF": {"compression": "tiff_lzw"},
        "WEBP": {"method": 0},
    }.get(name, {})
    path = tmp_path / "large"
    path.write_bytes(encoded(picture, name, **options))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)],
        cwd=ROOT,
        env=clean_environment(),
        text=True,
        capture_output=True,
        timeout=120,
        check=True,
    )
    shape, mib = done.stdout.splitlines()
    assert shape.startswith(f"({side}, {side}, ")
    assert float(mib) < 780  # with the program itself, libraries and torch, under 1 GiB


def test_a_bomb_within_the_limits_is_only_a_large_picture() -> None:
    """8,192 x 8,192 pixels in 8 KB: accepted, as photographs may be as large."""
    data = png_bomb(4096, 4096)
    assert len(data) < 4096
    assert outcome({"png": data, "txt": json.dumps("x").encode()}) == "good"
