"""Image folders: captions from text files beside the images, or from the folder names.

Every file below the folder ends in exactly one place: a sample, a skipped row with the reason, or a
rule by which it is ignored; their numbers are compared with a second count of the files. Linked
folders are followed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.records import (
    Ignored,
    Record,
    SkippedRow,
    class_caption,
    strip_extension,
)
from data_pipeline.sample_keys import IMAGE_KEYS

Element = Record | SkippedRow | Ignored


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Importer for folders, including their subfolders."""

    unit: ClassVar[str] = "files"
    folders: tuple[str, ...]
    caption_from: str = "text"
    """`text`: the `.txt` file with the image's name; `folder`: the name of the innermost folder."""
    template: str = "{}"
    """Caption template for a folder name: `a photo of a {}`."""

    def __call__(self) -> Iterator[Element]:
        """Every file, sorted by path.

        Raises:
            DataError: A folder cannot be read or has no image, or its files do not add up.
        """
        for folder in self.folders:
            num_inputs = num_records = 0
            for subfolder in _walk(folder):
                for element in self._elements(folder, subfolder):
                    num_inputs += element.inputs
                    num_records += not isinstance(element, Ignored)
                    yield element

            if not num_records:
                extensions = ", .".join(IMAGE_KEYS)
                raise DataError(f"there is no image in {storage.redact(folder)} (.{extensions})")
            if num_inputs != (expected := _count_files(folder)):
                raise DataError(
                    f"{storage.redact(folder)} has {expected} files, but {num_inputs} were read; "
                    f"it may have been changed meanwhile"
                )

    def _elements(self, folder: str, subfolder: _Subfolder) -> Iterator[Element]:
        """What becomes of the files of a subfolder."""
        path = f"{subfolder.path}/" if subfolder.path else ""
        yield from (Ignored(f"{path}{name}", "hidden file") for name in subfolder.hidden)
        for name, reason in subfolder.unusable:
            yield SkippedRow(f"{path}{name}", "unreadable", reason)

        # Matched without regard to case: IMG_1.JPG belongs to img_1.txt.
        texts = _by_stem(subfolder.names, "txt")
        fields = _by_stem(subfolder.names, "json")
        used: set[str] = set()
        images = [name for name in subfolder.names if _extension(name) in IMAGE_KEYS]
        for name in images:
            stem = strip_extension(name).lower()
            text = texts.get(stem) if self.caption_from == "text" else None
            companions = {file for file in (text, fields.get(stem)) if file} - used
            used |= companions
            record = self._record(folder, path, name, text, fields.get(stem))
            yield record._replace(inputs=1 + len(companions))

        by_stem = _names_by_stem(subfolder.names)
        used.update(images)
        for name in subfolder.names:
            if name in used:
                continue
            extension = _extension(name)
            if extension == "txt" and self.caption_from == "folder":
                yield Ignored(f"{path}{name}", "text file beside --caption-from folder")
            elif extension in ("txt", "json"):
                others = by_stem[strip_extension(name).lower()]
                yield SkippedRow(f"{path}{name}", *_why_unused(others))
            else:
                yield Ignored(f"{path}{name}", f".{extension} file" if extension else "other file")

    def _record(
        self, folder: str, path: str, name: str, text: str | None, fields_file: str | None
    ) -> Record | SkippedRow:
        """The sample of an image, or why it has none."""
        origin, fields = f"{path}{name}", dict[str, object]()
        try:
            if fields_file:
                fields = _read_fields(storage.join(folder, f"{path}{fields_file}"))
            if self.caption_from == "folder":
                label = path.rstrip("/") or storage.redact(folder).rstrip("/")
                caption = class_caption(label.rpartition("/")[2], self.template)
            elif text:
                caption = _read_text(storage.join(folder, f"{path}{text}"))
            else:
                missing = f"{strip_extension(name)}.txt"
                return SkippedRow(origin, "no-caption", f"there is no {missing} beside the image")
        except DataError as error:
            return SkippedRow(origin, error.slug or "unreadable", str(error))

        if not caption.strip():
            return SkippedRow(origin, "no-caption", "the caption is empty")
        image = storage.join(folder, origin)
        return Record(strip_extension(origin), image, (caption.strip(),), fields, origin)


class _Subfolder(NamedTuple):
    """The files of one folder, sorted."""

    path: str
    """Relative, with `/`; empty for the folder itself."""
    names: Sequence[str]
    hidden: Sequence[str] = ()
    unusable: Sequence[tuple[str, str]] = ()
    """Names that are no files, and why."""


def _walk(folder: str) -> Iterator[_Subfolder]:
    """All subfolders with their files."""
    if not storage.is_local(folder):
        yield from _group_by_folder(storage.list_tree(folder))
        return
    root = storage.local_path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is not a folder; check the path")
    yield from _walk_local(root, "", (_identity(root),))


def _walk_local(
    folder: Path, path: str, parents: tuple[tuple[int, int], ...]
) -> Iterator[_Subfolder]:
    names, hidden, unusable, subfolders = [], [], [], list[Path]()
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield _Subfolder(path, [], [], [(".", f"the folder cannot be read: {error.strerror}")])
        return
    for entry in entries:
        if entry.is_dir():
            if entry.name.startswith("."):
                hidden.append(entry.name)
            elif _identity(Path(entry.path)) in parents:
                unusable.append((entry.name, "it is a link to a folder that contains it"))
            else:
                subfolders.append(Path(entry.path))
        elif entry.name.startswith("."):
            hidden.append(entry.name)
        elif reason := _why_unusable(entry):
            unusable.append((entry.name, reason))
        else:
            names.append(entry.name)
    yield _Subfolder(path, names, hidden, unusable)
    for subfolder in subfolders:
        below = f"{path}/{subfolder.name}" if path else subfolder.name
        yield from _walk_local(subfolder, below, (*parents, _identity(subfolder)))


def _why_unusable(entry: os.DirEntry[str]) -> str:
    """Why an entry is not a file that can be read; empty if it is one."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "it is a link to a file that does not exist"
    return "" if stat.S_ISREG(mode) else "it is a pipe, socket or device, not a file"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _count_files(folder: str) -> int:
    """Entries below a folder that are not folders, counted independently of `_walk`.

    A hidden folder, an unreadable one and a link to a parent count as one.
    """
    if not storage.is_local(folder):
        return len(storage.list_tree(folder))
    root, total = storage.local_path(folder), 0
    for base, subfolders, files in os.walk(root, followlinks=True, onerror=lambda error: None):
        inside = [name for name in subfolders if not name.startswith(".")]
        total += len(files) + len(subfolders) - len(inside)
        real_base = os.path.realpath(base)
        loops = {
            name
            for name in inside
            if os.path.commonpath([real_base, target := os.path.realpath(f"{base}/{name}")])
            == target
        }
        unreadable = {name for name in inside if not os.access(f"{base}/{name}", os.R_OK | os.X_OK)}
        total += len(loops | unreadable)
        subfolders[:] = [name for name in inside if name not in loops | unreadable]
    return total


def _group_by_folder(paths: list[str]) -> Iterator[_Subfolder]:
    """Group the object names of a store, which has no folders, like `_walk_local`."""
    names: dict[str, list[str]] = {}
    for path in paths:
        subfolder, _, name = path.rpartition("/")
        names.setdefault(subfolder, []).append(name)
    for subfolder in sorted(names):
        hidden = [name for name in sorted(names[subfolder]) if name.startswith(".") or not name]
        visible = [name for name in sorted(names[subfolder]) if name not in hidden]
        yield _Subfolder(subfolder, visible, hidden)


def _extension(name: str) -> str:
    """In lower case; empty without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def _names_by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    """All files by their name without extension, in lower case."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(strip_extension(name).lower(), []).append(name)
    return by_stem


def _why_unused(others: Sequence[str]) -> tuple[str, str]:
    """Reason and detail of a text that belongs to no image.

    Args:
        others: All files with its name but for the extension, itself included.
    """
    images = [other for other in others if _extension(other) in IMAGE_KEYS]
    if images:
        return "several-texts", f"{images[0]} has another one, which is named like it but for case"
    if others := [other for other in others if _extension(other) not in ("txt", "json")]:
        return "no-image", (
            f"{others[0]} beside it does not have the extension of an image; if it is one, rename "
            f"it, or convert it to JPEG or PNG"
        )
    return "no-image", "there is no image with its name beside it"


def _by_stem(names: Sequence[str], extension: str) -> dict[str, str]:
    """Files with an extension by their name without it, in lower case."""
    return {strip_extension(name).lower(): name for name in names if _extension(name) == extension}


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
