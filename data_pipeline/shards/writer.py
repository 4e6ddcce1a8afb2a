"""Writes WebDataset shards with webdataset's own writer, then their indices and manifest.

Equal samples give equal bytes: no times, no user names. Every file is written aside and renamed, and
the manifest comes last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError
from data_pipeline.common.storage import replacing
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, describe_shard, write_manifest


def write_shards(
    samples: Iterable[Mapping[str, object]],
    folder: str | os.PathLike[str],
    *,
    prefix: str = "shard",
    samples_per_shard: int = 512,
    about: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write samples as `folder/prefix-000000.tar`, ... with indices and a manifest.

    Args:
        samples: WebDataset samples: `__key__` (no dot after the last slash), and contents by
            extension, e.g. `{"__key__": "a/7", "png": b"...", "txt": "...", "json": {...}}`.
        folder: Local; its old manifest is removed first.
        prefix: How the files' names begin.
        samples_per_shard: Samples of every shard but the last.
        about: More to say in the manifest.

    Raises:
        DataError: There are no samples, a key is unusable or comes twice in a shard, or a member
            cannot be written.
        StorageError: The disk is full.
    """
    base = Path(folder)
    (base / MANIFEST_NAME).unlink(missing_ok=True)
    stream, entries = iter(samples), list[ShardEntry]()
    while chunk := list(islice(stream, samples_per_shard)):
        path = base / f"{prefix}-{len(entries):06d}.tar"
        _write_tar(chunk, path)
        entries.append(describe_shard(path))
    if not entries:
        raise DataError(f"no samples to write to {base}")
    return write_manifest(base, entries, about)


def _write_tar(samples: list[Mapping[str, object]], path: Path) -> None:
    from webdataset import TarWriter  # slow to import, and only writers need it

    with replacing(path) as fd, open(fd, "wb", closefd=False) as file:
        # mtime 0 and webdataset's fixed owner: the same samples are the same bytes on any day.
        # Its own encoder would pickle some kinds of members: ours knows bytes, text and JSON.
        with TarWriter(file, mtime=0, encoder=_encoded) as tar:
            for sample in samples:
                _check_key(sample)
                try:
                    tar.write(sample)
                except (ValueError, TypeError) as error:
                    raise DataError(f"{path}: cannot write sample {sample['__key__']!r}: {error}") from error
        file.flush()


def _encoded(sample: Mapping[str, object]) -> dict[str, object]:
    return {name: value if name.startswith("__") else _bytes(name, value) for name, value in sample.items()}


def _bytes(extension: str, value: object) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if extension.rpartition(".")[2] == "json":
        return json.dumps(value, ensure_ascii=False).encode()
    if isinstance(value, str):
        return value.encode()
    raise TypeError(f"its .{extension} is a {type(value).__name__}; give bytes, or text for .txt, or JSON for .json")


def _check_key(sample: Mapping[str, object]) -> None:
    key = sample.get("__key__")
    if not isinstance(key, str) or not key or "." in key.rpartition("/")[2] or key.endswith("/"):
        raise DataError(
            f"the sample key {key!r} is unusable: WebDataset ends a key at the first dot of the file "
            f"name, so give a string without dots there"
        )
