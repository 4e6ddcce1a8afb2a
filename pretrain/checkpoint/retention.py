"""Which checkpoints stay: the newest few, and always the one that `latest` names.

A folder is removed by renaming it to a hidden name first, so that a kill half-way leaves something
that no reader takes for a checkpoint and that the next start clears away.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from pretrain.checkpoint.format import LATEST, REPLACED_PREFIX, WRITING_PREFIX, step_of, sync_folder

logger = logging.getLogger(__name__)

_REMOVING_PREFIX = ".removing-"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; whether they are whole is not looked at."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def read_latest(root: Path) -> str | None:
    """The folder name that `latest` holds, or None where there is no such file."""
    try:
        return (root / LATEST).read_text().strip()
    except FileNotFoundError:
        return None


def remove_old(root: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest checkpoints up to the one that `latest` names.

    Newer ones than that are left alone: they are from before a step back, and will be written
    again. Only one rank may call this. Trouble is a warning: too many checkpoints are no reason to
    stop.

    Returns:
        The folders that were removed.
    """
    named = step_of(read_latest(root) or "")
    if named is None:
        return []
    current = [path for path in list_checkpoints(root) if (step_of(path.name) or 0) <= named]
    old = current[: -max(1, keep)]
    removed = []
    for path in old:
        aside = root / (_REMOVING_PREFIX + path.name)
        try:
            os.rename(path, aside)
            shutil.rmtree(aside)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error)
        else:
            removed.append(path)
    return removed


def clear_leftovers(root: Path) -> None:
    """Clear away what a killed run left: half-written, replaced and half-removed folders.

    Only one rank may call this, while no other writes. A checkpoint that was set aside to be
    replaced goes back to its place if its replacement never arrived.
    """
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.name.startswith(REPLACED_PREFIX):
            home = root / path.name.removeprefix(REPLACED_PREFIX)
            if not home.exists():
                logger.warning("put back %s, whose replacement a killed run did not finish", home)
                os.rename(path, home)
                sync_folder(root)
                continue
        elif not path.name.startswith((WRITING_PREFIX, _REMOVING_PREFIX, f".{LATEST}-")):
            continue
        logger.info("removing %s, left behind by a run that was killed", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
