"""Turns records into samples: reads image files unchanged, skips files that are not images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.content.image import check_supported, decode_image, image_format
from data_pipeline.preparing.importers.parquet import Parquet, read_rows
from data_pipeline.preparing.importers.records import Importer, Record, SkippedRow

MAX_IMAGE_BYTES = 128 << 20
"""Larger files are skipped: they are not training images and would exhaust the memory of the
processes that read them."""
_REQUESTS_IN_FLIGHT = 16

Sample = dict[str, object]


def load_samples(
    records: Sequence[Record], source: Importer, *, decode: bool
) -> Iterator[Sample | SkippedRow]:
    """The samples of some records, in order, in the format of the shard writer.

    Args:
        records: The records of a shard.
        source: The importer that created them; parquet rows are read through it.
        decode: Also decode every image, and skip corrupt ones.
    """
    for row_path, group in groupby(records, key=lambda record: record.row and record.row[0]):
        if row_path and isinstance(source, Parquet):
            yield from _from_rows(list(group), row_path, source, decode)
        else:
            yield from _from_files(list(group), decode)


def _from_rows(
    records: list[Record], path: str, source: Parquet, decode: bool
) -> Iterator[Sample | SkippedRow]:
    indices = [record.row[1] for record in records if record.row]
    rows = read_rows(source, path, indices)
    for record, row in zip(records, rows, strict=True):
        filled = record._replace(captions=row.captions, fields=row.fields)
        yield _make_sample(filled, row.read_image, decode, row.why_no_caption)


def _from_files(records: list[Record], decode: bool) -> Iterator[Sample | SkippedRow]:
    if all(storage.is_local(record.image) for record in records):
        for record in records:
            yield _make_sample(record, partial(_read, record.image), decode)
        return

    # Requests to an object store have a high latency, so several are kept in flight.
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        pending: deque[Future[Sample | SkippedRow]] = deque()
        for record in records:
            pending.append(pool.submit(_make_sample, record, partial(_read, record.image), decode))
            if len(pending) == 2 * _REQUESTS_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _make_sample(
    record: Record, read: Callable[[], bytes], decode: bool, why_no_caption: str = ""
) -> Sample | SkippedRow:
    """One sample, or the reason to skip it."""
    try:
        data = read()
        extension = image_format(data)
        if not data or not extension:
            content = f"starts with {data[:12]!r}" if data else "is empty"
            raise DataError(f"the file {content}; it is not an image", slug="not-an-image")
        check_supported(extension)
        if decode:
            decode_image(data)
        if not record.captions:
            raise DataError(why_no_caption or "the row has no caption", slug="no-caption")
    except DataError as error:
        return SkippedRow(record.origin, error.slug or "unreadable", str(error), record.inputs)

    sample: Sample = {"__key__": record.key, extension: data, "txt": record.captions[0]}
    fields = dict(record.fields)
    if len(record.captions) > 1:
        if "captions" in fields:  # another column of that name is kept
            fields["source_captions"] = fields["captions"]
        fields["captions"] = list(record.captions)
    return sample | ({"json": fields} if fields else {})


def _read(url: str) -> bytes:
    """Read an image file.

    Raises:
        DataError: The file is missing, unreadable or too large (slug `missing-image`,
            `unreadable`, `oversize`).
    """
    try:
        if storage.is_local(url):
            path = storage.local_path(url)
            if not path.is_file():
                hint = "; replace the backslashes in its name by /" if "\\" in url else ""
                raise DataError(f"there is no file {url}{hint}", slug="missing-image")
            if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
                raise DataError(
                    f"{url} has {size} bytes; the limit is {MAX_IMAGE_BYTES}", slug="oversize"
                )
        return storage.read_bytes(url)
    except StorageError as error:
        is_missing = error.kind == ErrorKind.MISSING
        slug = "missing-image" if is_missing else "unreadable"
        raise DataError(str(error), slug=slug) from error
