"""Checks whether a data set is complete, unmodified, and built from the current inputs.

The stamp contains a fingerprint of the inputs, and the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.common.json_file import write_json

NAME = "stamp.json"
LIBRARIES = ("numpy", "opencv-python-headless", "resvg-py", "sentencepiece", "webdataset")
"""Packages whose version may change the output."""


def fingerprint(settings: dict[str, object], integrities: Sequence[str]) -> str:
    """A hash of everything that determines the data set.

    That is settings, hashes of the source packages, the code of this package, and library versions.
    """
    digest = hashlib.sha256(json.dumps([settings, list(integrities)], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + hashlib.sha256(source.read_bytes()).digest())
    for library in LIBRARIES:
        digest.update(f"{library} {_version(library)}\n".encode())
    return digest.hexdigest()


def write(folder: Path, inputs: str, files: Sequence[str], counts: dict[str, Any]) -> None:
    """Mark the data set in `folder` as complete.

    Args:
        folder: Folder of the data set.
        inputs: Its `fingerprint`.
        files: File names relative to `folder`.
        counts: Returned later by `read_if_complete`.
    """
    file_hashes = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in files
    }
    contents = {"fingerprint": inputs, "counts": counts, "files": file_hashes}
    write_json(folder / NAME, contents, indent=1)


def read_if_complete(folder: Path, inputs: str) -> tuple[dict[str, Any] | None, str]:
    """The counts in the stamp, if it has this fingerprint and all files are unmodified.

    Returns:
        The counts and an empty string; or None and the reason why the data set must be built.
    """
    try:
        stamp = json.loads((folder / NAME).read_text())
        files, counts = dict(stamp["files"]), dict(stamp["counts"])
    except FileNotFoundError:
        return None, "it does not exist"
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"{NAME} cannot be read"
    if stamp.get("fingerprint") != inputs:
        return None, "it was built by another version of this tool or with other settings"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return None, f"{name} is missing"
        # Sizes first: a different size is detected without reading the file.
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return None, f"{name} was modified"
    return counts, ""


def remove(folder: Path) -> None:
    """Remove the stamp, before any file that it covers is changed."""
    (folder / NAME).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "none"
