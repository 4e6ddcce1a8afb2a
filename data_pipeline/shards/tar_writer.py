"""Writes samples to a tar file with webdataset's writer, and indexes the result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import IO, Protocol

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.scan import scan
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.shard_stream import CHUNK_BYTES
from data_pipeline.shards.tar import split_name


class LazySample(Protocol):
    """A sample that is created in the process that writes it, so that reading is parallel too.

    Use a small picklable dataclass whose `repr` contains everything that the sample depends on. It
    may have an attribute `bytes`: its approximate size.
    """

    def load(self) -> Mapping[str, object]:
        """The sample, as `write_shards` takes it.

        Raises:
            DataError: It cannot be created.
        """


Sample = Mapping[str, object] | LazySample


def write_tar(
    samples: Iterable[Sample], file: IO[bytes], where: str, source_hash: str
) -> ShardIndex:
    """Write a shard to an open file, then read it back and index it.

    Args:
        samples: As for `write_shards`.
        file: Open for reading and writing.
        where: Address of the shard, for messages.
        source_hash: Stored in the index.

    Raises:
        DataError: A key is invalid or occurs twice, or a member cannot be written.
        StorageError: The file of a lazy sample cannot be read.
    """
    from webdataset import TarWriter  # slow to import

    keys = []
    # With mtime 0 and webdataset's fixed owner, equal samples give equal bytes. The default encoder
    # pickles some types; `_encode` accepts bytes, text and JSON only.
    with TarWriter(file, mtime=0, encoder=_encode) as tar:
        for sample in samples:
            contents = _load(sample, where)
            keys.append(_checked_key(contents))
            try:
                tar.write(contents)
            except (ValueError, TypeError) as error:
                raise DataError(f"{where}: cannot write sample {keys[-1]!r}: {error}") from error

    total_bytes = file.tell()
    file.flush()
    file.seek(0)
    chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
    index = scan(chunks, total_bytes, where, source_hash=source_hash)
    if index.keys != keys:
        pairs = zip(keys, index.keys, strict=False)
        lost = next((key for key, indexed in pairs if key != indexed), keys[-1])
        raise DataError(
            f"{where}: sample {lost!r} has no files or the same key as a neighboring sample; give "
            f"each sample a unique key and at least one file"
        )
    return index


def _load(sample: Sample, where: str) -> Mapping[str, object]:
    if isinstance(sample, Mapping):
        return sample
    try:
        return sample.load()
    except OSError as error:
        raise StorageError(f"{where}: cannot create the sample {sample!r}: {error}") from error


def _encode(sample: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value if name.startswith("_") else _to_bytes(name, value)
        for name, value in sample.items()
    }


def _to_bytes(extension: str, value: object) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if extension.rpartition(".")[2] == "json":
        return json.dumps(value, ensure_ascii=False).encode()
    if isinstance(value, str):
        return value.encode()
    raise TypeError(
        f"its .{extension} is a {type(value).__name__}; give bytes, a string for text, or JSON "
        f"values for .json"
    )


def _checked_key(sample: Mapping[str, object]) -> str:
    key = sample.get("__key__")
    if not isinstance(key, str) or split_name(f"{key}.x") != (key, "x") or "\0" in key:
        raise DataError(
            f"the sample key {key!r} is invalid: WebDataset ends a key at the first dot of the "
            f"file name and ignores `__names__`, so give a string without these"
        )
    return key
