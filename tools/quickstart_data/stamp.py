"""Knows whether a set that was built is still there, whole, and what would be built now.

The stamp names what the set was made from (a fingerprint) and every file with its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

NAME = "stamp.json"
LIBRARIES = ("numpy", "opencv-python-headless", "resvg-py", "sentencepiece", "webdataset")
"""Packages whose version may change the bytes that are written."""


def fingerprint(settings: dict[str, object], integrities: Sequence[str]) -> str:
    """A hash of all that the set follows from: settings, packages, this tool's code, libraries."""
    digest = hashlib.sha256(json.dumps([settings, list(integrities)], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + hashlib.sha256(source.read_bytes()).digest())
    for library in LIBRARIES:
        digest.update(f"{library} {_version(library)}\n".encode())
    return digest.hexdigest()


def write(folder: Path, made_from: str, files: Sequence[str], facts: dict[str, object]) -> None:
    """Say that `folder` is complete: `files` (relative names) were made from `made_from`.

    Args:
        folder: Where the set is.
        made_from: Its `fingerprint`.
        files: Names relative to `folder`.
        facts: What `read_if_whole` returns later, e.g. counts.
    """
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in files
    }
    aside = folder / f".{NAME}.part"
    aside.write_text(
        json.dumps({"made_from": made_from, "facts": facts, "files": listed}, indent=1) + "\n"
    )
    os.replace(aside, folder / NAME)


def read_if_whole(folder: Path, made_from: str) -> tuple[dict[str, Any] | None, str]:
    """The facts in the stamp if everything is there and as it was written.

    Returns:
        The facts and an empty string; or None and the reason why the set must be built.
    """
    try:
        stamp = json.loads((folder / NAME).read_text())
        files, facts = dict(stamp["files"]), dict(stamp["facts"])
    except FileNotFoundError:
        return None, "nothing is there yet"
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"{NAME} cannot be read"
    if stamp.get("made_from") != made_from:
        return None, "it was made by another version of this tool, or with other settings"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return None, f"{name} is missing"
        # Sizes first: they name most damage without reading anything.
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return None, f"{name} is not as it was written"
    return facts, ""


def forget(folder: Path) -> None:
    """Take the stamp away before anything it vouches for is changed."""
    (folder / NAME).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "none"
