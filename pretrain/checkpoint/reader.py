"""Finds, checks and loads checkpoints.

`latest` says where to go on. If what it names is missing or damaged, the newest whole checkpoint is
taken instead with an error in the log: some steps are done again, nothing wrong is learned. If none
is whole, that is an error; a run never starts from nothing while there are checkpoints.
Files are hashed before a single value reaches the engine.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import CheckpointError
from pretrain.checkpoint.format import (
    LATEST,
    CheckpointEngine,
    DamagedCheckpointError,
    Meta,
    optimizer_file,
    rank_file,
    step_of,
)
from pretrain.checkpoint.retention import clear_leftovers, list_checkpoints, read_latest
from pretrain.checkpoint.verify import check_hashes, check_sizes, read_meta
from pretrain.checkpoint.weights import TensorFiles, weight_files

logger = logging.getLogger(__name__)

_HOW_TO_MATCH = {
    "world_size": "start the run with {found} ranks",
    "expert_parallel_size": "set parallel.expert_parallel_size={found}",
    "zero_stage": "set parallel.deepspeed to a profile with ZeRO stage {found}",
    "precision": "set precision.compute={found}",
    "num_experts": "set moe.num_experts={found}",
    "expert_layer": "set moe.backend={found}",
}


class Loaded(NamedTuple):
    """What a run goes on from, beside the tensors that the engine took."""

    state_json: dict[str, Any]
    rank_state: dict[str, Any]


class Resumed(NamedTuple):
    """A checkpoint that was loaded, and from where."""

    path: Path
    state_json: dict[str, Any]
    rank_state: dict[str, Any]


def find_latest(root: Path) -> Path | None:
    """The checkpoint to go on from, judged by its meta.json and the sizes of its files.

    Returns:
        Its folder, or None where there are no checkpoints yet.

    Raises:
        CheckpointError: There are checkpoints, but none is whole.
    """
    for path in _candidates(root):
        try:
            check_sizes(path, read_meta(path))
        except DamagedCheckpointError as error:
            _warn(path, error)
        else:
            return path
    _refuse_if_any(root)
    return None


def load(engine: CheckpointEngine, path: Path) -> Loaded:
    """Load one checkpoint into the engine; collective over all ranks.

    Raises:
        DamagedCheckpointError: A file is missing or changed; on every rank alike, before the engine
            was given anything.
        CheckpointError: It belongs to another layout.
    """
    problem, meta = None, None
    try:
        meta = read_meta(path)
        _check_layout(path, meta, engine.layout.to_json())
        check_sizes(path, meta)
        # Each file is hashed once: by the rank in its name, which is there since the layouts agree.
        mine = f"-{engine.rank:05d}."
        check_hashes(path, meta, [name for name in meta.files if mine in name])
    except (CheckpointError, OSError) as error:
        problem = {"message": str(error), "damaged": type(error) is not CheckpointError}
    problems = [note for note in engine.gather_json(problem) if note is not None]
    if problems:
        kind = DamagedCheckpointError if problems[0]["damaged"] else CheckpointError
        raise kind(problems[0]["message"])
    assert meta is not None
    engine.load_model_tensors(TensorFiles(weight_files(path, meta)))
    shard = optimizer_file(engine.rank)
    engine.load_optimizer_tensors(dict(TensorFiles([path / shard])) if shard in meta.files else {})
    return Loaded(meta.state, json.loads((path / rank_file(engine.rank)).read_bytes()))


def load_latest(engine: CheckpointEngine, root: Path) -> Resumed | None:
    """Clear what a killed run left, then load the checkpoint to go on from; collective.

    Returns:
        What was loaded, or None where there are no checkpoints yet.

    Raises:
        CheckpointError: There are checkpoints, but none is whole, or they belong to another layout.
    """
    names: list[str] = []
    if engine.rank == 0:
        clear_leftovers(root)
        names = [path.name for path in _candidates(root)]
    names = engine.gather_json(names)[0]
    for name in names:
        try:
            return Resumed(root / name, *load(engine, root / name))
        except DamagedCheckpointError as error:
            _warn(root / name, error)
    if names:
        _refuse_if_any(root)
    return None


def _check_layout(path: Path, meta: Meta, layout: dict[str, Any]) -> None:
    names = sorted({*meta.layout, *layout})
    differing = [name for name in names if meta.layout.get(name) != layout.get(name)]
    if not differing:
        return
    facts = ", ".join(
        f"{name} {meta.layout.get(name)} (now {layout.get(name)})" for name in differing
    )
    how = " and ".join(_how_to_match(name, meta.layout.get(name)) for name in differing)
    raise CheckpointError(
        f"checkpoint {path} was written under another layout: {facts}. To go on from it, {how}; "
        f"to start afresh, use another run folder"
    )


def _how_to_match(name: str, found: Any) -> str:
    if name == "zero_stage" and found == -1:
        return "set parallel.engine=plain"
    if name == "expert_layer" and found is None:
        return "set moe.backend=auto"
    return _HOW_TO_MATCH.get(name, f"use {name} {{found}}").format(found=found)


def _candidates(root: Path) -> list[Path]:
    """What `latest` names, then the others, newest first."""
    named = read_latest(root)
    others = [path for path in reversed(list_checkpoints(root)) if path.name != named]
    if named is not None and step_of(named) is None:
        where = root / LATEST
        logger.error(
            "%s holds %r, which is no checkpoint's name; taking the newest one", where, named
        )
        named = None
    return ([root / named] if named else []) + others


def _warn(path: Path, error: CheckpointError) -> None:
    logger.error("%s cannot be used (%s); looking for an older whole one", path, error)


def _refuse_if_any(root: Path) -> None:
    if _candidates(root):
        raise CheckpointError(
            f"no checkpoint in {root} is whole (see the messages above); restore one, or move the folder "
            f"away to start the run afresh"
        )
