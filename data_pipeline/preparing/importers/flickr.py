"""Flickr8k and Flickr30k: caption lists with several lines per image.

1000268201_693b08cb0e.jpg#0<tab>A child in a pink dress ...       Flickr8k.token.txt,
                                                                  results_20130124.token
1000092795.jpg| 0| Two young guys with shaggy hair ...            results.csv
1000268201_693b08cb0e.jpg,A child in a pink dress ...             captions.txt
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.delimited import read_lines
from data_pipeline.preparing.importers.image_url import resolve_image_url
from data_pipeline.preparing.importers.records import Ignored, Record, SkippedRow, strip_extension
from data_pipeline.preparing.importers.table import group_by_image

_TOKEN_LINE = re.compile(r"(?P<name>[^\t#|]+)#\d+\t(?P<caption>.*)")
# The second `|` is missing in one line of the published file.
_BAR_LINE = re.compile(r"(?P<name>[^|]+?)\s*\|\s*\d+\s*\|?\s*(?P<caption>.*)")
_HEADERS = (
    "image_name| comment_number| comment",
    "image_name|comment_number|comment",
    "image,caption",
)


@dataclass(frozen=True, kw_only=True)
class Flickr:
    """Importer for the caption lists above; the format is detected for each line."""

    unit: ClassVar[str] = "lines"
    files: tuple[str, ...]
    image_folder: str

    def __call__(self) -> Iterator[Record | SkippedRow | Ignored]:
        """Every image with its captions; the lines of an image must be consecutive."""
        for url in self.files:
            yield from group_by_image(self._lines(url))

    def _lines(self, url: str) -> Iterator[Record | SkippedRow | Ignored]:
        file_label = storage.redact(url).rpartition("/")[2]
        for number, text in enumerate(read_lines(url), 1):
            line, origin = text.strip(), f"{file_label} line {number}"
            if not line:
                yield Ignored(origin, "blank line")
            elif number == 1 and line in _HEADERS:
                yield Ignored(origin, "header")
            else:
                yield self._record(line, origin)

    def _record(self, line: str, origin: str) -> Record | SkippedRow:
        name, caption = _split(line)
        if not name:
            detail = f"expected NAME#N<tab>TEXT, NAME|N|TEXT or NAME,TEXT: {line[:80]!r}"
            return SkippedRow(origin, "malformed-row", detail)
        if not caption:
            return SkippedRow(origin, "no-caption", "the caption is empty")

        try:
            image = resolve_image_url(name, self.image_folder)
        except DataError as error:
            return SkippedRow(origin, error.slug, str(error))
        return Record(strip_extension(name), image, (caption,), {}, origin)


def _split(line: str) -> tuple[str, str]:
    """Image name and caption of a line; two empty strings for a malformed line."""
    if match := _TOKEN_LINE.fullmatch(line) or _BAR_LINE.fullmatch(line):
        return match["name"].strip(), match["caption"].strip()
    row = next(csv.reader([line]), [])
    return (row[0].strip(), row[1].strip()) if len(row) == 2 and "." in row[0] else ("", "")
