"""Reads the packages and finds the concept of every drawing; nothing is rendered yet."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError
from tools.quickstart_data.captions import (
    Concept,
    caption_of_icon,
    concepts_of,
    match_name,
    strip_variation_selector,
)
from tools.quickstart_data.sources import Source

_SKIN_TONE = re.compile(r"1F3F[B-F]")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A drawing to render, and its concept."""

    key: str
    """Sample key, e.g. `noto_1f600`, without dots and slashes."""
    source: str
    """Key of its source."""
    concept: Concept
    data: str | bytes
    """SVG text, or the bytes of an image file."""


def load_concepts(tarball: Path) -> list[Concept]:
    """The concepts of the emojibase package."""
    files = _read_json(tarball, ("en/data.json", "meta/groups.json"))
    metadata = files["meta/groups.json"]
    groups = {int(number): name for number, name in metadata["groups"].items()}
    subgroups = {int(number): name for number, name in metadata["subgroups"].items()}
    return concepts_of(files["en/data.json"], groups, subgroups)


def collect(source: Source, tarball: Path, concepts: list[Concept]) -> list[Drawing]:
    """All drawings of one source that have a concept, sorted by key."""
    if source.kind == "webp":
        drawings = _match_files(source, tarball, concepts)
    elif source.kind == "code-points":
        drawings = _match_code_points(source, tarball, concepts)
    else:
        drawings = _match_names(source, tarball, concepts)
    return sorted(drawings, key=lambda drawing: drawing.key)


def _match_files(source: Source, tarball: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    remaining = {concept.hexcode: concept for concept in concepts}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            if not member.name.endswith(".webp"):
                continue
            # A matched code is removed: some emoji have two files, with and without FE0F.
            code = strip_variation_selector(Path(member.name).stem)
            if code in remaining and (file := archive.extractfile(member)):
                yield _drawing(source, code.lower(), remaining.pop(code), file.read())


def _match_code_points(source: Source, tarball: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    files = _read_json(tarball, ("icons.json", "chars.json"))
    by_code = {concept.hexcode: concept for concept in concepts}
    for code, icon in files["chars.json"].items():
        code = strip_variation_selector(code)
        # Redundant, because no concept has a skin tone, but explicit.
        if code in by_code and not _SKIN_TONE.search(code):
            yield _drawing(source, code.lower(), by_code[code], svg(files["icons.json"], icon))


def _match_names(source: Source, tarball: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    icons = _read_json(tarball, ("icons.json",))["icons.json"]
    by_name: dict[str, Concept] = {}
    for concept in concepts:
        by_name.setdefault(match_name(concept.caption), concept)
    for icon, entry in icons["icons"].items():
        if entry.get("hidden") or "skin-tone" in icon:
            continue
        match = by_name.get(match_name(icon))
        # Names such as `abstract-017` do not describe the drawing.
        if match is None and source.kind == "words" and not icon.startswith("abstract-"):
            match = Concept(caption=caption_of_icon(icon))
        if match is not None:
            yield _drawing(source, icon, match, svg(icons, icon))


def _drawing(source: Source, name: str, concept: Concept, data: str | bytes) -> Drawing:
    return Drawing(key=f"{source.key}_{name}", source=source.key, concept=concept, data=data)


def svg(icons: Mapping[str, Any], icon: str) -> str:
    """An Iconify icon as a scalable SVG; `icons` is the contents of `icons.json`."""
    entry = icons["icons"][icon]
    left, top = (entry.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="100" height="100">{entry["body"]}</svg>'
    )


def _read_json(tarball: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read JSON files from a package by name; nothing is unpacked to disk."""
    contents: dict[str, Any] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if name in names and (file := archive.extractfile(member)):
                contents[name] = json.load(file)
    if missing := set(names) - set(contents):
        raise DataError(
            f"{tarball} does not contain {', '.join(sorted(missing))}; is it another version?"
        )
    return contents
