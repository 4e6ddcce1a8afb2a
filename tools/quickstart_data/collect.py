"""Opens the packages and finds what every picture shows; nothing is drawn yet."""

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
    concepts_of,
    match_name,
    without_selector,
    words_of,
)
from tools.quickstart_data.sources import Source

_SKIN_TONE = re.compile(r"1F3F[B-F]")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture to render, and what it shows."""

    key: str
    """Key of its sample, e.g. `noto_1f600`: no dots, no slashes."""
    source: str
    """Key of its source."""
    concept: Concept
    """What it shows."""
    picture: str | bytes
    """SVG text, or a picture file's bytes."""


def load_concepts(tarball: Path) -> list[Concept]:
    """The concepts of the emojibase package."""
    files = _read_json(tarball, ("en/data.json", "meta/groups.json"))
    meta = files["meta/groups.json"]
    groups = {int(number): name for number, name in meta["groups"].items()}
    subgroups = {int(number): name for number, name in meta["subgroups"].items()}
    return concepts_of(files["en/data.json"], groups, subgroups)


def collect(source: Source, tarball: Path, concepts: list[Concept]) -> list[Drawing]:
    """Every drawing of one source that has a caption, in the order of its keys."""
    if source.kind == "webp":
        found = _by_file(source, tarball, concepts)
    elif source.kind == "code-points":
        found = _by_code_points(source, tarball, concepts)
    else:
        found = _by_name(source, tarball, concepts)
    return sorted(found, key=lambda drawing: drawing.key)


def _by_file(source: Source, tarball: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    left = {concept.hexcode: concept for concept in concepts}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            code = without_selector(Path(member.name).stem)
            # Taken out once found: a few emoji are there twice, with and without FE0F.
            if (
                member.name.endswith(".webp")
                and code in left
                and (file := archive.extractfile(member))
            ):
                yield _drawing(source, code.lower(), left.pop(code), file.read())


def _by_code_points(source: Source, tarball: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    files = _read_json(tarball, ("icons.json", "chars.json"))
    by_code = {concept.hexcode: concept for concept in concepts}
    for code, icon in files["chars.json"].items():
        code = without_selector(code)
        # Concepts have no skin tones, so a toned drawing would find none; this says it aloud.
        if code in by_code and not _SKIN_TONE.search(code):
            yield _drawing(source, code.lower(), by_code[code], svg(files["icons.json"], icon))


def _by_name(source: Source, tarball: Path, concepts: list[Concept]) -> Iterator[Drawing]:
    icons = _read_json(tarball, ("icons.json",))["icons.json"]
    by_name: dict[str, Concept] = {}
    for concept in concepts:
        by_name.setdefault(match_name(concept.caption), concept)
    for icon, entry in icons["icons"].items():
        if entry.get("hidden") or "skin-tone" in icon:
            continue
        known = by_name.get(match_name(icon))
        if known is None and source.kind == "words" and not icon.startswith("abstract-"):
            known = Concept(caption=words_of(icon))  # `abstract-017` says nothing about its drawing
        if known is not None:
            yield _drawing(source, icon, known, svg(icons, icon))


def _drawing(source: Source, name: str, concept: Concept, picture: str | bytes) -> Drawing:
    return Drawing(key=f"{source.key}_{name}", source=source.key, concept=concept, picture=picture)


def svg(icons: Mapping[str, Any], icon: str) -> str:
    """An Iconify icon as an SVG of any size: `icons` is the set's `icons.json`."""
    entry = icons["icons"][icon]
    left, top = (entry.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="100" height="100">{entry["body"]}</svg>'
    )


def _read_json(tarball: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Some JSON files of a package by name; read from the tarball, nothing is unpacked to disk."""
    found: dict[str, Any] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if name in names and (file := archive.extractfile(member)):
                found[name] = json.load(file)
    if missing := set(names) - set(found):
        raise DataError(f"{tarball} holds no {', '.join(sorted(missing))}; is it another version?")
    return found
