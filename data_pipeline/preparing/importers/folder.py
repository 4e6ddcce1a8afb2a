"""Image folders: captions from text files beside the images, or from the folder names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.records import Record, SkippedRow, strip_extension

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Importer for folders, including their subfolders."""

    folders: tuple[str, ...]
    caption_from: str = "text"
    """`text`: the `.txt` file with the image's name; `folder`: the name of the innermost folder."""
    template: str = "{}"
    """Caption template for a folder name: `a photo of a {}`."""

    def __call__(self) -> Iterator[Record | SkippedRow]:
        """Every image, sorted by path."""
        for folder in self.folders:
            is_empty = True
            for subfolder, names in _walk(folder):
                name_set = set(names)
                for name in names:
                    if "." in name and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                        is_empty = False
                        yield self._record(folder, subfolder, name, name_set)

            if is_empty:
                extensions = ", .".join(IMAGE_EXTENSIONS)
                raise DataError(f"there is no image in {storage.redact(folder)} (.{extensions})")

    def _record(
        self, folder: str, subfolder: str, name: str, names: set[str]
    ) -> Record | SkippedRow:
        path = f"{subfolder}/{name}" if subfolder else name
        stem = strip_extension(name)
        path_stem = strip_extension(path)
        fields: dict[str, object] = {}
        try:
            if f"{stem}.json" in names:
                fields = _read_fields(storage.join(folder, f"{path_stem}.json"))
            if self.caption_from == "folder":
                caption = self._folder_caption(subfolder or storage.redact(folder).rstrip("/"))
            elif f"{stem}.txt" in names:
                caption = _read_text(storage.join(folder, f"{path_stem}.txt"))
            else:
                return SkippedRow(path, "no-caption", f"there is no {stem}.txt beside the image")
        except DataError as error:
            return SkippedRow(path, error.slug or "unreadable", str(error))

        if not caption.strip():
            return SkippedRow(path, "no-caption", "the caption is empty")
        return Record(path_stem, storage.join(folder, path), (caption.strip(),), fields, path)

    def _folder_caption(self, path: str) -> str:
        label = path.rpartition("/")[2]
        return self.template.replace("{}", label.replace("_", " ").replace("-", " ").strip())


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Subfolders (relative paths with `/`) and the names of their files, sorted."""
    if not storage.is_local(folder):
        yield from _group_by_folder(storage.list_tree(folder))
        return

    root = storage.local_path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is not a folder; check the path")
    for base, subfolders, names in os.walk(root):
        subfolders.sort()
        subfolder = os.path.relpath(base, root).replace(os.sep, "/")
        visible = sorted(name for name in names if not name.startswith("."))
        yield "" if subfolder == "." else subfolder, visible


def _group_by_folder(paths: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Group the object names of a store, which has no folders, like `_walk`."""
    names: dict[str, list[str]] = {}
    for path in paths:
        subfolder, _, name = path.rpartition("/")
        names.setdefault(subfolder, []).append(name)
    for subfolder in sorted(names):
        yield subfolder, sorted(names[subfolder])


def _read_text(url: str) -> str:
    try:
        return storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the .txt file is not UTF-8: {error}", slug="invalid-text") from error


def _read_fields(url: str) -> dict[str, object]:
    try:
        value = json.loads(storage.read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the .json file is not JSON: {error}", slug="invalid-json") from error
    if not isinstance(value, dict):
        raise DataError("the .json file must contain a JSON object", slug="invalid-json")
    return value
