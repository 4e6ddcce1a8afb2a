"""Small packages with the structure of those that the quickstart data is built from."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.quickstart_data.sources import EMOJIBASE, SOURCES, Package
from tools.quickstart_data.split import is_held_out

NAMES = [
    "grinning face",
    "red heart",
    "flag: Norway",
    "snow leopard",
    "fire truck",
    "sea lion",
    "tea cup",
    "polar bear",
    "paper clip",
    "sun hat",
    "ice cream",
    "blue moon",
    "wine glass",
    "night owl",
    "golden key",
    "rain cloud",
    "top hat",
    "jigsaw",
    "honey pot",
    "yarn",
    "rocket",
    "anchor",
    "wolf",
    "drum",
]
CODES = [f"1F{600 + index}" for index in range(len(NAMES))]
HELD_OUT = [name for name, code in zip(NAMES, CODES, strict=True) if is_held_out(code)]
ROWS: list[dict[str, Any]] = [
    {
        "label": name,
        "hexcode": f"{code}-FE0F",
        "group": 0,
        "subgroup": 1,
        "tags": ["thing", *HELD_OUT, name.split()[0]],
    }
    for name, code in zip(NAMES, CODES, strict=True)
]
ROWS += [
    {"label": "red hair", "hexcode": "1F9B0", "group": 2, "subgroup": 0},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
GROUPS = {
    "groups": {"0": "smileys-emotion", "2": "component"},
    "subgroups": {"0": "hair", "1": "face-smiling"},
}


def svg_body(index: int) -> str:
    """Contents of an SVG, distinct for every index."""
    x, radius, red = 20 + index, 10 + index % 7, index * 9 + 16
    return f'<circle cx="{x}" cy="32" r="{radius}" fill="#{red:02x}80f0"/>'


def write_tarball(path: Path, files: dict[str, Any]) -> Path:
    """Write an npm tarball; contents are bytes or JSON values."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_tarballs(folder: Path) -> dict[Package, Path]:
    """Write a tarball for every package of `sources`."""
    folder.mkdir(parents=True, exist_ok=True)
    emojibase = {"en/data.json": ROWS, "meta/groups.json": GROUPS}
    tarballs = {EMOJIBASE: write_tarball(folder / "e.tgz", emojibase)}
    files_of_kind = {
        "webp": _webp_files(),
        "code-points": _code_point_files(),
        "names": _name_files(),
        "words": _name_files(),
    }
    for source in SOURCES:
        path = folder / f"{source.key}.tgz"
        tarballs[source.package] = write_tarball(path, files_of_kind[source.kind])
    return tarballs


def _webp_files() -> dict[str, Any]:
    square = np.zeros((256, 256, 4), np.uint8)
    square[64:192, 64:192] = (30, 60, 200, 255)
    webp = cv2.imencode(".webp", square, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    first = CODES[0].lower()
    # A duplicate with selector, a skin tone, and a regional letter must not be used.
    codes = [*(code.lower() for code in CODES), f"{first}-fe0f", f"{first}-1f3fb", "1f1e6"]
    return {f"assets/{code}.webp": webp for code in codes}


def _code_point_files() -> dict[str, Any]:
    names = [_icon_name(name) for name in NAMES]
    codes = dict(zip((code.lower() for code in CODES), names, strict=True))
    codes |= {f"{CODES[0].lower()}-1f3fb": f"{names[0]}-light-skin-tone", "1f1e6": names[0]}
    return {"icons.json": _icons(names), "chars.json": codes}


def _name_files() -> dict[str, Any]:
    names = [_icon_name(name).replace("flag-", "flag-for-") for name in NAMES[::2]]
    names += ["abstract-001", "magic-wand", "skateboarding-02", "red-heart-light-skin-tone"]
    icons = _icons(names)
    icons["icons"]["ghost"] = {"body": svg_body(1), "hidden": True}
    return {"icons.json": icons}


def _icons(names: Sequence[str]) -> dict[str, Any]:
    bodies = {name: {"body": svg_body(index)} for index, name in enumerate(names)}
    return {"width": 64, "height": 64, "icons": bodies}


def _icon_name(name: str) -> str:
    return re.sub("[^a-z]+", "-", name.lower())
