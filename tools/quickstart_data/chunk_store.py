"""Stores the images of a rendered chunk in a file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from data_pipeline.common.storage import atomic_write


def save(path: Path, images: dict[str, bytes]) -> None:
    """Write images by key atomically."""
    with atomic_write(path) as descriptor, open(descriptor, "wb", closefd=False) as file:
        np.savez(
            file,
            keys=np.array(list(images)),
            sizes=np.array([len(data) for data in images.values()], np.int64),
            data=np.frombuffer(b"".join(images.values()), np.uint8),
        )


def load(path: Path) -> dict[str, bytes] | None:
    """Read images by key; None if the file is missing or corrupt."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys, sizes, data = (stored[name] for name in ("keys", "sizes", "data"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(sizes)
    raw = data.tobytes()
    return {
        str(key): raw[end - size : end] for key, size, end in zip(keys, sizes, ends, strict=True)
    }
