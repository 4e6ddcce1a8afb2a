"""Finds, verifies and loads checkpoints.

A run resumes from the checkpoint that `latest` names. If that one is missing or corrupt, an error
is logged and the newest intact checkpoint is used instead, so only some steps are repeated. If none
is intact, an error is raised: a run never starts from scratch while there are checkpoints.

All files are hashed before any value is loaded into the engine.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.format import (
    LATEST,
    CorruptCheckpointError,
    Meta,
    optimizer_file,
    parse_step,
    rank_file,
)
from pretrain.checkpoint.retention import list_checkpoints, read_latest, remove_incomplete
from pretrain.checkpoint.verify import check_hashes, check_sizes, read_meta
from pretrain.checkpoint.weights import TensorFiles, weight_files
from pretrain.parallel.engine import Engine
from pretrain.parallel.errors import CheckpointError

logger = logging.getLogger(__name__)

_HOW_TO_MATCH = {
    "world_size": "start the run with a world size of {value}",
    "expert_parallel_size": "set parallel.expert_parallel_size={value}",
    "zero_stage": "set parallel.deepspeed to a profile with ZeRO stage {value}",
    "precision": "set precision.compute={value}",
    "num_experts": "set moe.num_experts={value}",
}
"""How to start a run with the same value as the checkpoint, for each field of a layout."""


class LoadedState(NamedTuple):
    """State of a loaded checkpoint other than the engine's tensors."""

    state_json: dict[str, Any]
    rank_state: dict[str, Any]


class ResumedCheckpoint(NamedTuple):
    """Path and state of a loaded checkpoint."""

    path: Path
    state_json: dict[str, Any]
    rank_state: dict[str, Any]


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


def load(engine: Engine, path: Path) -> LoadedState:
    """Load one checkpoint into the engine. Collective.

    Raises:
        CorruptCheckpointError: A file is missing or modified; raised on every rank, before the
            engine is changed.
        CheckpointError: It was written with another layout.
    """
    rank, problem, meta = engine.communicator.rank, None, None
    try:
        meta = read_meta(path)
        _check_layout(path, meta, engine.layout.to_json())
        check_sizes(path, meta)
        # Each file is hashed by the rank in its name; equal layouts imply that the rank exists.
        suffix = f"-{rank:05d}."
        check_hashes(path, meta, [name for name in meta.files if suffix in name])
    except (CheckpointError, OSError) as error:
        problem = {"message": str(error), "corrupt": type(error) is not CheckpointError}
    problems = [p for p in engine.communicator.all_gather_json(problem) if p is not None]
    if problems:
        error_class = CorruptCheckpointError if problems[0]["corrupt"] else CheckpointError
        raise error_class(problems[0]["message"])

    assert meta is not None
    engine.load_model_tensors(TensorFiles(weight_files(path, meta)))
    shard = optimizer_file(rank)
    engine.load_optimizer_tensors(dict(TensorFiles([path / shard])) if shard in meta.files else {})
    return LoadedState(meta.state, json.loads((path / rank_file(rank)).read_bytes()))


def load_latest(engine: Engine, root: Path) -> ResumedCheckpoint | None:
    """Remove incomplete folders, then load the checkpoint to resume from. Collective.

    Returns:
        The loaded checkpoint, or None if there are no checkpoints yet.

    Raises:
        CheckpointError: There are checkpoints, but none is intact, or their layout differs.
    """
    names: list[str] = []
    if engine.communicator.rank == 0:
        remove_incomplete(root)
        names = [path.name for path in _candidates(root)]
    names = engine.communicator.all_gather_json(names)[0]
    for name in names:
        try:
            return ResumedCheckpoint(root / name, *load(engine, root / name))
        except CorruptCheckpointError as error:
            _log_corrupt(root / name, error)
    if names:
        _raise_if_checkpoints_exist(root)
    return None


def _check_layout(path: Path, meta: Meta, layout: dict[str, Any]) -> None:
    names = sorted({*meta.layout, *layout})
    differing = [name for name in names if meta.layout.get(name) != layout.get(name)]
    if not differing:
        return
    differences = ", ".join(
        f"{name} {meta.layout.get(name)} (now {layout.get(name)})" for name in differing
    )
    how_to_match = " and ".join(_how_to_match(name, meta.layout.get(name)) for name in differing)
    raise CheckpointError(
        f"checkpoint {path} was written with another layout: {differences}. To resume from it, "
        f"{how_to_match}; to start from scratch, use another run folder"
    )


def _how_to_match(name: str, value: Any) -> str:
    if name == "zero_stage" and value == -1:
        return "set parallel.engine=plain"
    return _HOW_TO_MATCH.get(name, f"use {name} {{value}}").format(value=value)


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
