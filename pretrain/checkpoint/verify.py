"""Verification of a checkpoint's files against its meta.json."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.checkpoint.files import hash_file
from pretrain.checkpoint.format import META, CorruptCheckpointError, Meta


def read_meta(folder: Path) -> Meta:
    """Read and verify a checkpoint's meta.json.

    Raises:
        CorruptCheckpointError: It is missing or modified.
        CheckpointError: It has an unsupported format version.
    """
    path = folder / META
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        problem = "has no meta.json" if folder.is_dir() else "does not exist"
        raise CorruptCheckpointError(f"checkpoint {folder} {problem}") from None
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON ({error})") from None
    return Meta.from_json(value, path=path)


def check_sizes(folder: Path, meta: Meta) -> None:
    """Check that every file exists with its full size, without reading it.

    Raises:
        CorruptCheckpointError: A file is missing or has another size.
    """
    for name, record in meta.files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{folder / name} is missing") from None
        if size != record.bytes:
            raise CorruptCheckpointError(
                f"{folder / name} has {size:,} bytes, but {record.bytes:,} were written"
            )


def check_hashes(folder: Path, meta: Meta, names: list[str]) -> None:
    """Read the named files and compare their SHA-256 with meta.json.

    Raises:
        CorruptCheckpointError: A hash differs.
    """
    for name in names:
        actual, expected = hash_file(folder / name).sha256, meta.files[name].sha256
        if actual != expected:
            raise CorruptCheckpointError(
                f"{folder / name} has SHA-256 {actual[:12]}..., but {expected[:12]}... was written"
            )
