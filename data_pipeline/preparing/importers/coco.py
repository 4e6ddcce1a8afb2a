"""COCO captions: one JSON file with images and annotations, several captions per image."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.image_url import resolve_image_url
from data_pipeline.preparing.importers.records import Record, SkippedRow, strip_extension


@dataclass(frozen=True, kw_only=True)
class Coco:
    """Importer for `captions_train2017.json` and similar files."""

    unit: ClassVar[str] = "images and annotations"
    files: tuple[str, ...]
    image_folder: str

    def __call__(self) -> Iterator[Record | SkippedRow]:
        """Every image in the order of the file, with all its captions sorted by annotation id; then
        the annotations of unknown images."""
        for url in self.files:
            file_label = storage.redact(url).rpartition("/")[2]
            images, captions = _read(url)
            for image_id, image_name in images:
                origin = f"{file_label} image {image_id}"
                annotations = captions.pop(image_id, [])
                texts = tuple(text for _, text in sorted(annotations) if text)
                inputs = 1 + len(annotations)
                if not texts:
                    yield SkippedRow(origin, "no-caption", "the image has no annotation", inputs)
                    continue

                try:
                    image = resolve_image_url(image_name, self.image_folder)
                except DataError as error:
                    yield SkippedRow(origin, error.slug, str(error), inputs)
                    continue
                fields = {"image_id": image_id}
                key = strip_extension(image_name)
                yield Record(key, image, texts, fields, origin, inputs=inputs)
            for image_id, annotations in captions.items():
                origin = f"{file_label} image {image_id}"
                detail = f"{len(annotations)} annotations of an image that is not in `images`"
                yield SkippedRow(origin, "no-image", detail, len(annotations))


def _read(url: str) -> tuple[list[tuple[int, str]], dict[int, list[tuple[int, str]]]]:
    """Images as (id, file name), and captions as (annotation id, text) by image id."""
    captions: dict[int, list[tuple[int, str]]] = defaultdict(list)
    try:
        content = json.loads(storage.read_bytes(url))
        images = [(int(image["id"]), str(image["file_name"])) for image in content["images"]]
        for annotation in content["annotations"]:
            text = " ".join(str(annotation["caption"]).split())
            captions[int(annotation["image_id"])].append((int(annotation["id"]), text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{storage.redact(url)} is not a COCO captions file ({type(error).__name__}: {error}); "
            f"expected `images` with id and file_name, and `annotations` with id, image_id and "
            f"caption"
        ) from error
    return images, captions
