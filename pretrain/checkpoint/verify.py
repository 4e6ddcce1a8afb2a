"""Tells a whole checkpoint from a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.checkpoint.format import META, DamagedCheckpointError, Meta, hash_file


def read_meta(path: Path) -> Meta:
    """Read and check a checkpoint's meta.json.

    Raises:
        DamagedCheckpointError: It is missing or changed.
        CheckpointError: It has another format version.
    """
    where = path / META
    try:
        value = json.loads(where.read_bytes())
    except FileNotFoundError:
        what = "has no meta.json" if path.is_dir() else "does not exist"
        raise DamagedCheckpointError(f"checkpoint {path} {what}") from None
    except ValueError as error:
        raise DamagedCheckpointError(f"{where} is not JSON ({error})") from None
    return Meta.from_json(value, where=where)


def check_sizes(path: Path, meta: Meta) -> None:
    """See that every file is there in full, without reading it.

    Raises:
        DamagedCheckpointError: A file is missing or has another size.
    """
    for name, record in meta.files.items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{path / name} is missing") from None
        if found != record.bytes:
            raise DamagedCheckpointError(
                f"{path / name} has {found:,} bytes, but {record.bytes:,} were written"
            )


def check_hashes(path: Path, meta: Meta, names: list[str]) -> None:
    """Read the named files and compare what is in them with what was written.

    Raises:
        DamagedCheckpointError: A file differs.
    """
    for name in names:
        found, written = hash_file(path / name).sha256, meta.files[name].sha256
        if found != written:
            raise DamagedCheckpointError(
                f"{path / name} has SHA-256 {found[:12]}..., but {written[:12]}... was written"
            )
