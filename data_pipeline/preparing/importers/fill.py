"""From records to samples: reads the pictures, as they are, and names those that are none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.store_errors import Kind
from data_pipeline.content.images import decode
from data_pipeline.preparing.importers.parquet import Parquet, rows_of
from data_pipeline.preparing.importers.records import Importer, LeftOut, Record
from data_pipeline.preparing.pictures import format_of

MAX_PICTURE_BYTES = 128 << 20
"""A larger file is no picture to train on, and would take the memory of its readers."""
_REQUESTS_IN_FLIGHT = 16

Sample = dict[str, object]


def samples_of(
    records: Sequence[Record], source: Importer, *, check: bool
) -> Iterator[Sample | LeftOut]:
    """The samples of some records, in order, ready for the writer.

    Args:
        records: Of one shard.
        source: What made them; parquet rows are read through it.
        check: Decode every picture too, and leave out those that cannot be.
    """
    for row_path, group in groupby(records, key=lambda record: record.row and record.row[0]):
        if row_path and isinstance(source, Parquet):
            yield from _from_rows(list(group), row_path, source, check)
        else:
            yield from _from_files(list(group), check)


def _from_rows(
    records: list[Record], path: str, source: Parquet, check: bool
) -> Iterator[Sample | LeftOut]:
    numbers = [record.row[1] for record in records if record.row]
    for record, (picture, captions, fields) in zip(
        records, rows_of(source, path, numbers), strict=True
    ):
        filled = record._replace(captions=captions, fields=fields)
        yield _sample(filled, lambda data=picture: data, check)  # type: ignore[misc]


def _from_files(records: list[Record], check: bool) -> Iterator[Sample | LeftOut]:
    if all(storage.is_local(record.picture) for record in records):
        for record in records:
            yield _sample(record, partial(_read, record.picture), check)
        return
    # A store answers after some hundredths of a second, but many requests at once.
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        waiting: deque[Future[Sample | LeftOut]] = deque()
        for record in records:
            waiting.append(pool.submit(_sample, record, partial(_read, record.picture), check))
            if len(waiting) == 2 * _REQUESTS_IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _sample(record: Record, read: Callable[[], bytes], check: bool) -> Sample | LeftOut:
    """One sample, or why it is none."""
    try:
        data = read()
        kind = format_of(data)
        if not data or not kind:
            begins = f"begins with {data[:12]!r}" if data else "is empty"
            raise DataError(f"the file {begins}, which is no picture", slug="no-picture")
        if check:
            decode(data)
        if not record.captions:
            raise DataError("it has no caption", slug="no-caption")
    except DataError as error:
        return LeftOut(record.origin, error.slug or "unreadable", str(error))
    sample: Sample = {"__key__": record.key, kind: data, "txt": record.captions[0]}
    fields = dict(record.fields)
    if len(record.captions) > 1:
        fields["captions"] = list(record.captions)
    return sample | ({"json": fields} if fields else {})


def _read(url: str) -> bytes:
    """A picture's file.

    Raises:
        DataError: Missing, unreadable or too large (slug `missing-picture`, `unreadable`,
        `oversize`).
    """
    try:
        if storage.is_local(url):
            path = storage.local_path(url)
            if not path.is_file():
                raise DataError(f"there is no file {url}", slug="missing-picture")
            if (count := path.stat().st_size) > MAX_PICTURE_BYTES:
                raise DataError(
                    f"{url} has {count} bytes, more than {MAX_PICTURE_BYTES}", slug="oversize"
                )
        return storage.read_bytes(url)
    except StorageError as error:
        missing = error.kind == Kind.MISSING
        raise DataError(str(error), slug="missing-picture" if missing else "unreadable") from error
