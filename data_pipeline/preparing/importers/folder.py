"""Folders of pictures: the caption lies beside each as text, or is the name of the folder it lies
in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.records import LeftOut, Record, stem_of

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """An importer of folders, with all folders in them."""

    folders: tuple[str, ...]
    caption_from: str = "text"
    """`text`: the file of the same name that ends in `.txt`; `folder`: the innermost folder's
    name."""
    template: str = "{}"
    """Around the folder's name: `a photo of a {}`."""

    def __call__(self) -> Iterator[Record | LeftOut]:
        """Every picture, sorted by path."""
        for folder in self.folders:
            found = False
            for below, names in _walk(folder):
                texts = set(names)
                for name in names:
                    if name.rpartition(".")[2].lower() in PICTURES and "." in name:
                        found = True
                        yield self._record(folder, below, name, texts)
            if not found:
                raise DataError(
                    f"there is no picture in {storage.redact(folder)} (.{', .'.join(PICTURES)})"
                )

    def _record(self, folder: str, below: str, name: str, names: set[str]) -> Record | LeftOut:
        path = f"{below}/{name}" if below else name
        address, stem = storage.join(folder, path), stem_of(name)
        fields: dict[str, object] = {}
        try:
            if f"{stem}.json" in names:
                fields = _fields(storage.join(folder, stem_of(path) + ".json"))
            if self.caption_from == "folder":
                label = (below or storage.redact(folder).rstrip("/")).rpartition("/")[2]
                caption = self.template.replace(
                    "{}", label.replace("_", " ").replace("-", " ").strip()
                )
            elif f"{stem}.txt" in names:
                caption = _text(storage.join(folder, stem_of(path) + ".txt"))
            else:
                return LeftOut(path, "no-caption", f"there is no {stem}.txt beside it")
        except DataError as error:
            return LeftOut(path, error.slug or "unreadable", str(error))
        if not caption.strip():
            return LeftOut(path, "no-caption", f"{stem}.txt is empty")
        return Record(stem_of(path), address, (caption.strip(),), fields, path)


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Folders below `folder` (relative, with `/`) and the names of their files, sorted."""
    if not storage.is_local(folder):
        yield from _grouped(storage.list_tree(folder))
        return
    root = storage.local_path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is no folder; check the path")
    for base, folders, names in os.walk(root):
        folders.sort()
        below = os.path.relpath(base, root).replace(os.sep, "/")
        yield (
            "" if below == "." else below,
            sorted(name for name in names if not name.startswith(".")),
        )


def _grouped(paths: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The same of paths in a store, which has no folders."""
    names: dict[str, list[str]] = {}
    for path in paths:
        below, _, name = path.rpartition("/")
        names.setdefault(below, []).append(name)
    for below in sorted(names):
        yield below, sorted(names[below])


def _text(url: str) -> str:
    try:
        return storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"its text is not UTF-8: {error}", slug="bad-text") from error


def _fields(url: str) -> dict[str, object]:
    try:
        value = json.loads(storage.read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise DataError(f"its .json is not JSON: {error}", slug="bad-json") from error
    if not isinstance(value, dict):
        raise DataError("its .json holds no object with fields", slug="bad-json")
    return value
