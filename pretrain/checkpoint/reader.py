"""Finds, verifies and loads checkpoints.

A run resumes from the checkpoint that `latest` names. If that one is missing or corrupt, an error
is logged and the newest intact checkpoint is used instead, so only some steps are repeated. If none
is intact, an error is raised: a run never starts from scratch while there are checkpoints.

All files are hashed before any value is loaded into the engine. A run can have another layout than
the one that wrote the checkpoint: other numbers of ranks, experts per rank, another ZeRO stage,
precision or engine.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.format import LATEST, CorruptCheckpointError, parse_step
from pretrain.checkpoint.retention import list_checkpoints, read_latest, remove_incomplete
from pretrain.checkpoint.saved_state import SavedState
from pretrain.checkpoint.verify import check_hashes, check_sizes, read_meta
from pretrain.parallel.engine import Engine
from pretrain.parallel.errors import CheckpointError

logger = logging.getLogger(__name__)


class ResumedCheckpoint(NamedTuple):
    """Path and state of a loaded checkpoint."""

    path: Path
    state_json: dict[str, Any]
    layout: dict[str, Any]
    """The layout that wrote it."""


def find_latest(root: Path) -> Path | None:
    """The checkpoint to resume from, verified by its meta.json and the sizes of its files.

    Returns:
        Its folder, or None if there are no checkpoints yet.

    Raises:
        CheckpointError: There are checkpoints, but none is intact.
    """
    for path in _candidates(root):
        try:
            check_sizes(path, read_meta(path))
        except CorruptCheckpointError as error:
            _log_corrupt(path, error)
        else:
            return path
    _raise_if_checkpoints_exist(root)
    return None


def load(engine: Engine, path: Path) -> ResumedCheckpoint:
    """Load one checkpoint into the engine. Collective.

    Raises:
        CorruptCheckpointError: A file is missing or modified; raised on every rank, before the
            engine is changed.
        CheckpointError: It is one of another model; also before the engine is changed.
    """
    rank, world_size = engine.communicator.rank, engine.communicator.world_size
    problem, state = None, None
    try:
        meta = read_meta(path)
        check_sizes(path, meta)
        state = SavedState(path, meta)
        state.check_shapes(engine.shapes())
        check_hashes(path, meta, sorted(meta.files)[rank::world_size])
    except (CheckpointError, OSError) as error:
        # Other errors, as of a server that does not respond, must not lead to an older checkpoint.
        is_corrupt = isinstance(error, CorruptCheckpointError | FileNotFoundError)
        problem = {"message": str(error), "corrupt": is_corrupt}
    problems = [p for p in engine.communicator.all_gather_json(problem) if p is not None]
    if problems:
        error_class = CorruptCheckpointError if problems[0]["corrupt"] else CheckpointError
        raise error_class(problems[0]["message"])

    assert state is not None
    engine.load_state(state)
    return ResumedCheckpoint(path, meta.state, meta.layout)


def load_latest(engine: Engine, root: Path) -> ResumedCheckpoint | None:
    """Remove incomplete folders, then load the checkpoint to resume from. Collective.

    Returns:
        The loaded checkpoint, or None if there are no checkpoints yet.

    Raises:
        CheckpointError: There are checkpoints, but none is intact, or they are of another model.
    """
    names: list[str] = []
    if engine.communicator.rank == 0:
        remove_incomplete(root)
        names = [path.name for path in _candidates(root)]
    names = engine.communicator.all_gather_json(names)[0]
    for name in names:
        try:
            return load(engine, root / name)
        except CorruptCheckpointError as error:
            _log_corrupt(root / name, error)
    if names:
        _raise_if_checkpoints_exist(root)
    return None


def _candidates(root: Path) -> list[Path]:
    """The checkpoint that `latest` names, then the others, newest first."""
    latest = read_latest(root)
    others = [path for path in reversed(list_checkpoints(root)) if path.name != latest]
    if latest is not None and parse_step(latest) is None:
        logger.error(
            "%s contains %r, which is not the name of a checkpoint; using the newest one",
            root / LATEST,
            latest,
        )
        latest = None
    return ([root / latest] if latest else []) + others


def _log_corrupt(path: Path, error: CheckpointError) -> None:
    logger.error("%s cannot be used (%s); trying an older checkpoint", path, error)


def _raise_if_checkpoints_exist(root: Path) -> None:
    if _candidates(root):
        raise CheckpointError(
            f"no checkpoint in {root} is intact (see the messages above); restore one, or move the "
            f"folder away to start from scratch"
        )
