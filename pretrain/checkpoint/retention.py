"""Retention: keeps the newest checkpoints, always including the one that `latest` names.

Before a folder is removed, it is renamed to a hidden name. If the process is killed in between, no
reader mistakes the remaining files for a checkpoint, and the next start removes them.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from pretrain.checkpoint.files import fsync_folder
from pretrain.checkpoint.format import LATEST, REPLACED_PREFIX, WRITING_PREFIX, parse_step

logger = logging.getLogger(__name__)

_REMOVING_PREFIX = ".removing-"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first, without checking that they are complete."""
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := parse_step(path.name)) is not None]
    return [path for _, path in sorted(steps) if path.is_dir()]


def read_latest(root: Path) -> str | None:
    """The folder name in the file `latest`, or None if there is no such file."""
    try:
        return (root / LATEST).read_text().strip()
    except FileNotFoundError:
        return None


def remove_old_checkpoints(root: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest checkpoints up to the one that `latest` names.

    Newer checkpoints are kept: the run was rolled back to an older one and will replace them.
    Errors are only logged, since training can continue with too many checkpoints. Call on one
    rank only.

    Returns:
        The folders that were removed.
    """
    latest_step = parse_step(read_latest(root) or "")
    if latest_step is None:
        return []
    current = [
        path for path in list_checkpoints(root) if (parse_step(path.name) or 0) <= latest_step
    ]
    removed = []
    for path in current[: -max(1, keep)]:
        hidden = root / (_REMOVING_PREFIX + path.name)
        try:
            os.rename(path, hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error)
        else:
            removed.append(path)
    return removed


def remove_incomplete(root: Path) -> None:
    """Remove what a killed process left: half-written, replaced and half-removed folders.

    A checkpoint that was renamed to be replaced is restored if its replacement is missing. Call on
    one rank only, while no other process writes.
    """
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.name.startswith(REPLACED_PREFIX):
            original = root / path.name.removeprefix(REPLACED_PREFIX)
            if not original.exists():
                logger.warning("restoring %s: writing its replacement was interrupted", original)
                os.rename(path, original)
                fsync_folder(root)
                continue
        elif not path.name.startswith((WRITING_PREFIX, _REMOVING_PREFIX, f".{LATEST}-")):
            continue
        logger.info("removing %s, left by an interrupted run", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
