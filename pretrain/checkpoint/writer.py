"""Atomic saving: if a save is interrupted or fails, the previous checkpoint stays valid.

    every rank   writes its file into .writing-step-N and fsyncs it
    all ranks    exchange sizes, hashes and errors
    rank 0       writes meta.json, renames the folder to step-N, then updates `latest`
    all ranks    exchange the result

A folder is not a checkpoint before it is renamed, and runs resume from the previous checkpoint
until `latest` is replaced. If anything fails on any rank, every rank raises the same error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.common.tables import counted
from pretrain.checkpoint.files import (
    FileRecord,
    fsync_folder,
    write_file,
    write_json,
    write_tensors,
)
from pretrain.checkpoint.format import (
    LATEST,
    META,
    REPLACED_PREFIX,
    WRITING_PREFIX,
    Meta,
    SavedParameter,
    state_file,
    step_name,
    tensor_name,
)
from pretrain.checkpoint.reader import find_latest
from pretrain.checkpoint.retention import remove_incomplete, remove_old_checkpoints
from pretrain.parallel.communicator import Communicator
from pretrain.parallel.engine import Engine
from pretrain.parallel.errors import CheckpointError
from pretrain.parallel.state_fragments import Fragment

logger = logging.getLogger(__name__)


def save(
    engine: Engine,
    *,
    root: Path,
    step: int,
    state_json: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Save one checkpoint. Collective.

    Args:
        engine: Provides this rank's tensors and the collectives.
        root: The `checkpoints` folder of the run, on a file system that all ranks share.
        step: Number of completed optimizer steps.
        state_json: State of the training loop; the one of rank 0 is saved.
        keep: Number of newest checkpoints to keep.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: Writing failed on some rank; raised on every rank. All files of this
            checkpoint are removed, and `latest` is unchanged.
    """
    started = time.monotonic()
    writing, final = root / (WRITING_PREFIX + step_name(step)), root / step_name(step)
    attempt = _SaveAttempt(engine.communicator, root=root, step=step)
    if engine.communicator.rank == 0:
        attempt.run(writing, lambda: _create_folder(writing))
    attempt.synchronize(writing)

    shapes = engine.shapes()
    path = writing / state_file(engine.communicator.rank)
    written = attempt.run(path, lambda: _write_fragments(path, engine.state_fragments(), shapes))
    gathered = attempt.synchronize(writing, result=written)

    size = 0
    if engine.communicator.rank == 0:
        meta = _make_meta(step, engine.layout.to_json(), shapes, gathered, state_json)
        attempt.run(final, lambda: _publish(writing, final, meta))
        size = sum(record.bytes for record in meta.files.values())
    attempt.synchronize(writing)

    if engine.communicator.rank == 0:
        remove_old_checkpoints(root, keep)
        gib, seconds = size / 2**30, time.monotonic() - started
        logger.info("saved %s: %.2f GiB in %.1f s", final, gib, seconds)
    return final


def _write_fragments(
    path: Path, fragments: Iterable[Fragment], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Write what one rank saves; returns JSON values for `_make_meta`."""
    index_of = {name: index for index, name in enumerate(shapes)}
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int, int]] = []
    steps: dict[int, list[int]] = {}
    for fragment in fragments:
        index, count = index_of[fragment.name], len(next(iter(fragment.values.values())))
        ranges.append((index, fragment.start, count))
        steps.setdefault(fragment.steps, []).append(index)
        for kind, values in fragment.values.items():
            tensors[tensor_name(fragment.name, fragment.start, kind)] = values
    record = write_tensors(path, tensors)
    return {
        "name": path.name,
        "record": record._asdict(),
        "ranges": ranges,
        "steps": [*steps.items()],
    }


def _make_meta(
    step: int,
    layout: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    written: Sequence[dict[str, Any]],
    state: dict[str, Any],
) -> Meta:
    """The meta.json of the files that all ranks have written."""
    names = list(shapes)
    steps = dict.fromkeys(names, 0)
    for rank in written:
        for count, indices in rank["steps"]:
            for index in indices:
                steps[names[index]] = max(steps[names[index]], count)
    return Meta(
        step=step,
        layout=layout,
        files={rank["name"]: FileRecord(**rank["record"]) for rank in written},
        parameters={name: SavedParameter(shape, steps[name]) for name, shape in shapes.items()},
        fragments={rank["name"]: rank["ranges"] for rank in written},
        state=state,
    )


class _SaveAttempt:
    """Collects the errors of this rank until all ranks exchange them."""

    def __init__(self, communicator: Communicator, *, root: Path, step: int) -> None:
        self._communicator, self._root, self._step = communicator, root, step
        self._problem: str | None = None
        self._cause: Exception | None = None

    def run(self, path: Path, write: Callable[[], Any]) -> Any:
        """Run one operation unless an earlier one failed; returns None after a failure."""
        if self._problem is not None:
            return None
        try:
            return write()
        except Exception as error:  # noqa: BLE001 - raised on all ranks by `synchronize`
            self._cause = error
            reason = _describe_error(error, self._root)
            self._problem = f"rank {self._communicator.rank} could not write {path}: {reason}"
            return None

    def synchronize(self, writing: Path, result: Any = None) -> list[Any]:
        """Exchange results and errors; returns the results in rank order. Collective.

        Raises:
            CheckpointError: An operation failed on some rank; raised on every rank.
        """
        reports = self._communicator.all_gather_json({"problem": self._problem, "result": result})
        problems = [report["problem"] for report in reports if report["problem"] is not None]
        if not problems:
            return [report["result"] for report in reports]

        previous = ""
        if self._communicator.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            previous = _describe_previous(self._root)
        # Also ensures that the folder is removed before any rank continues.
        previous = self._communicator.all_gather_json(previous)[0]
        others = f" ({counted(len(problems) - 1, 'more rank')} failed)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"checkpoint of step {self._step} was not saved: {problems[0]}{others}. {previous}"
        ) from self._cause


def _create_folder(writing: Path) -> None:
    writing.parent.mkdir(parents=True, exist_ok=True)
    remove_incomplete(writing.parent)
    os.mkdir(writing)


def _publish(writing: Path, final: Path, meta: Meta) -> None:
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


def _describe_error(error: Exception, root: Path) -> str:
    """The reason of a failed write, and what to do about it."""
    if not isinstance(error, OSError):
        return str(error) if isinstance(error, CheckpointError) else repr(error)
    reason = f"{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(root).free / 2**20:,.1f} MiB free)"
        return f"{reason}; free some space or lower checkpoint.keep, then rerun to resume"
    if error.errno == errno.ENOENT:
        return f"{reason}; is the run folder on a file system that all ranks share?"
    return f"{reason}; fix the file system, then rerun to resume"


def _describe_previous(root: Path) -> str:
    try:
        path = find_latest(root)
    except CheckpointError as error:
        return f"There is no intact earlier checkpoint: {error}"
    return f"The previous checkpoint {path} is intact" if path else "There is no earlier checkpoint"
