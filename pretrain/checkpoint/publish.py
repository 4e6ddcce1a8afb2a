"""Turns a folder of written files into a checkpoint: rename, then `latest`; rank 0 only."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from pretrain.checkpoint.files import fsync_folder, write_file, write_json
from pretrain.checkpoint.format import LATEST, META, REPLACED_PREFIX, Meta
from pretrain.checkpoint.retention import remove_incomplete

logger = logging.getLogger(__name__)


def create_folder(writing: Path) -> None:
    writing.parent.mkdir(parents=True, exist_ok=True)
    remove_incomplete(writing.parent)
    os.mkdir(writing)


def publish(writing: Path, final: Path, meta: Meta) -> None:
    """Rename the folder to its final name and update `latest`; undo the rename if that fails."""
    write_json(writing / META, meta.to_json())
    fsync_folder(writing)
    root = final.parent
    replaced = root / (REPLACED_PREFIX + final.name)
    if final.exists():
        # After a rollback to an older checkpoint, the same step is reached a second time.
        os.rename(final, replaced)
    try:
        os.rename(writing, final)
        fsync_folder(root)
        _replace_latest(root, final.name)
    except Exception:
        if final.exists():
            os.rename(final, writing)
        if replaced.exists():
            os.rename(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _replace_latest(root: Path, name: str) -> None:
    temporary = root / f".{LATEST}-new"
    temporary.unlink(missing_ok=True)
    try:
        write_file(temporary, [f"{name}\n".encode()])
        os.replace(temporary, root / LATEST)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    try:
        fsync_folder(root)
    except OSError as error:
        # `latest` is already replaced, but after a power failure its old contents may reappear.
        logger.warning(
            "%s names %s, but fsync of its folder failed: %s", root / LATEST, name, error
        )
