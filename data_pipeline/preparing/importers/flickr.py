"""Flickr8k and Flickr30k: a list of captions, several lines a picture.

1000268201_693b08cb0e.jpg#0<tab>A child in a pink dress ...       Flickr8k.token.txt, results_20130124.token
1000092795.jpg| 0| Two young guys with shaggy hair ...            results.csv
1000268201_693b08cb0e.jpg,A child in a pink dress ...             captions.txt
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.pictures_at import picture_address
from data_pipeline.preparing.importers.records import LeftOut, Record, stem_of
from data_pipeline.preparing.importers.table import grouped, open_text

_TOKEN = re.compile(r"(?P<name>[^\t#|]+)#\d+\t(?P<caption>.*)")
# The second bar is missing in one line of the published file.
_BARS = re.compile(r"(?P<name>[^|]+?)\s*\|\s*\d+\s*\|?\s*(?P<caption>.*)")
_HEADERS = (
    "image_name| comment_number| comment",
    "image_name|comment_number|comment",
    "image,caption",
)


@dataclass(frozen=True, kw_only=True)
class Flickr:
    """An importer of caption lists as above; the kind shows in each line."""

    files: tuple[str, ...]
    pictures: str
    """Folder of the pictures."""

    def __call__(self) -> Iterator[Record | LeftOut]:
        """Every picture with its captions; the lines of one picture must follow each other."""
        for url in self.files:
            yield from grouped(self._lines(url))

    def _lines(self, url: str) -> Iterator[Record | LeftOut]:
        shown = storage.redact(url).rpartition("/")[2]
        with open_text(url) as file:
            try:
                for number, line in enumerate(file, 1):
                    line = line.strip()
                    if line and not (number == 1 and line in _HEADERS):
                        yield self._record(line, f"{shown} line {number}")
            except UnicodeDecodeError as error:
                raise DataError(f"{storage.redact(url)} is not UTF-8: {error}") from error

    def _record(self, line: str, origin: str) -> Record | LeftOut:
        name, caption = _split(line)
        if not name:
            return LeftOut(
                origin,
                "bad-row",
                f"neither NAME#N<tab>TEXT, NAME|N|TEXT nor NAME,TEXT: {line[:80]!r}",
            )
        if not caption:
            return LeftOut(origin, "no-caption", "its caption is empty")
        try:
            address = picture_address(name, self.pictures)
        except DataError as error:
            return LeftOut(origin, error.slug, str(error))
        return Record(stem_of(name), address, (caption,), {}, origin)


def _split(line: str) -> tuple[str, str]:
    """Name and caption of one line; two empty strings where it is none."""
    if match := _TOKEN.fullmatch(line) or _BARS.fullmatch(line):
        return match["name"].strip(), match["caption"].strip()
    row = next(csv.reader([line]), [])
    return (row[0].strip(), row[1].strip()) if len(row) == 2 and "." in row[0] else ("", "")
