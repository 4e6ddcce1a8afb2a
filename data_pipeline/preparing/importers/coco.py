"""COCO captions: one JSON file with pictures and annotations, several captions a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.pictures_at import picture_address
from data_pipeline.preparing.importers.records import LeftOut, Record, stem_of


@dataclass(frozen=True, kw_only=True)
class Coco:
    """An importer of `captions_train2017.json` and the like."""

    files: tuple[str, ...]
    pictures: str
    """Folder of the pictures."""

    def __call__(self) -> Iterator[Record | LeftOut]:
        """Every picture in the file's order, with all its captions in the order of their ids."""
        for url in self.files:
            name = storage.redact(url).rpartition("/")[2]
            images, captions = _read(url)
            for image_id, file_name in images:
                origin = f"{name} image {image_id}"
                found = tuple(text for _, text in sorted(captions.get(image_id, [])))
                if not found:
                    yield LeftOut(origin, "no-caption", "no annotation names it")
                    continue
                try:
                    address = picture_address(file_name, self.pictures)
                except DataError as error:
                    yield LeftOut(origin, error.slug, str(error))
                    continue
                yield Record(stem_of(file_name), address, found, {"image_id": image_id}, origin)


def _read(url: str) -> tuple[list[tuple[int, str]], dict[int, list[tuple[int, str]]]]:
    """Pictures as (id, file name), and captions as (annotation id, text) by picture."""
    where = storage.redact(url)
    captions: dict[int, list[tuple[int, str]]] = defaultdict(list)
    try:
        content = json.loads(storage.read_bytes(url))
        images = [(int(image["id"]), str(image["file_name"])) for image in content["images"]]
        for note in content["annotations"]:
            if text := " ".join(str(note["caption"]).split()):
                captions[int(note["image_id"])].append((int(note["id"]), text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where} is no file of COCO captions ({type(error).__name__}: {error}); it needs `images` with id "
            f"and file_name, and `annotations` with id, image_id and caption"
        ) from error
    return images, captions
