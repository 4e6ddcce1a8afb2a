"""Atomic saving: if a save is interrupted or fails, the previous checkpoint stays valid.

    all ranks    copy their state, and train on
    every rank   writes its copy into .writing-step-N and fsyncs it
    all ranks    exchange sizes, hashes and errors
    rank 0       writes meta.json, renames the folder to step-N, then updates `latest`
    all ranks    exchange the result

A folder is not a checkpoint before it is renamed, and runs resume from the previous checkpoint
until `latest` is replaced. If anything fails on any rank, every rank raises the same error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.background import Task, copy_to_buffers
from pretrain.checkpoint.files import FileRecord, write_tensors
from pretrain.checkpoint.format import (
    WRITING_PREFIX,
    Meta,
    SavedParameter,
    state_file,
    step_name,
    tensor_name,
)
from pretrain.checkpoint.publish import create_folder, publish
from pretrain.checkpoint.retention import remove_old_checkpoints
from pretrain.checkpoint.save_attempt import SaveAttempt
from pretrain.checkpoint.saved_state import SavedState
from pretrain.parallel.engine import Engine
from pretrain.parallel.errors import CheckpointError
from pretrain.parallel.state_fragments import MOMENTS, Fragment

logger = logging.getLogger(__name__)


def save(
    engine: Engine, *, root: Path, step: int, state_json: dict[str, Any], keep: int = 2
) -> Path:
    """Save one checkpoint and wait until it is complete; see `CheckpointWriter`. Collective."""
    writer = CheckpointWriter(engine, root, keep=keep)
    writer.start(step, state_json, in_background=False)
    return writer.finish()


class CheckpointWriter:
    """Saves checkpoints while training continues.

    `start` copies the state of this rank to CPU memory; a thread writes the copy. When all ranks
    have written, rank 0 publishes the checkpoint, in a thread too. `advance` and `finish` continue
    on all ranks together; between them, `is_ready` says whether this rank's thread is done.
    """

    def __init__(self, engine: Engine, root: Path, *, keep: int = 2) -> None:
        """Prepare; no file is written.

        Args:
            engine: Provides this rank's state and the collectives.
            root: The `checkpoints` folder of the run, on a file system that all ranks share.
            keep: Number of newest checkpoints to keep.
        """
        self._engine, self._root, self._keep = engine, root, keep
        self._buffers: dict[str, Tensor] = {}
        """Copies of this rank's tensors, reused by the next checkpoint."""
        self._save: _Save | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is being saved; the same on every rank."""
        return self._save is not None

    def is_ready(self) -> bool:
        """Whether this rank can `advance`: nothing is pending, or its thread is done."""
        return self._save is None or self._save.task.is_done()

    def start(self, step: int, state_json: dict[str, Any], *, in_background: bool = True) -> None:
        """Start to save a checkpoint, after the previous one is complete. Collective.

        Args:
            step: Number of completed optimizer steps.
            state_json: State of the training loop; the one of rank 0 is saved.
            in_background: Write while training continues; otherwise nothing is copied, and this
                rank's part is written when the call returns.

        Raises:
            CheckpointError: The folder cannot be created, or the previous checkpoint was not saved;
                raised on every rank.
        """
        self.finish()
        save = _Save(self._engine, self._root, step, state_json, self._keep)
        save.create_folder()
        buffers = self._buffers if in_background else None
        save.write(
            lambda: copy_to_buffers(self._engine.state_fragments(), buffers),
            in_background=in_background,
        )
        self._save = save

    def advance(self) -> None:
        """Continue with the pending checkpoint once every rank is ready. Collective.

        Raises:
            CheckpointError: Writing failed on some rank; raised on every rank. All files of this
                checkpoint are removed, and `latest` is unchanged.
        """
        assert self._save is not None
        try:
            if self._save.advance():
                self._save = None
        except BaseException:
            self._save = None
            raise

    def finish(self) -> Path:
        """Wait until the pending checkpoint is complete; returns its folder. Collective.

        Raises:
            CheckpointError: As for `advance`.
        """
        final = self._save.final if self._save else self._root
        while self._save is not None:
            self._save.task.wait()
            self.advance()
        return final


class _Save:
    """One checkpoint that is being saved."""

    def __init__(
        self, engine: Engine, root: Path, step: int, state_json: dict[str, Any], keep: int
    ) -> None:
        self.final = root / step_name(step)
        self.task = Task()
        self._writing = root / (WRITING_PREFIX + step_name(step))
        self._communicator, self._layout = engine.communicator, engine.layout.to_json()
        self._shapes = engine.shapes()
        self._step, self._state_json, self._keep = step, state_json, keep
        self._attempt = SaveAttempt(engine.communicator, root=root, step=step)
        self._started, self._bytes, self._is_written = time.monotonic(), 0, False

    def create_folder(self) -> None:
        """Create the folder of unfinished files. Collective."""
        if self._communicator.rank == 0:
            self._attempt.run(self._writing, lambda: create_folder(self._writing))
        self._attempt.synchronize(self._writing)

    def write(self, copy_state: Callable[[], list[Fragment]], *, in_background: bool) -> None:
        """Copy this rank's state now, and write it."""
        path = self._writing / state_file(self._communicator.rank)
        fragments = self._attempt.run(path, copy_state)

        def work() -> Any:
            return self._attempt.run(path, lambda: _write_fragments(path, fragments, self._shapes))

        self.task = Task(work, in_background=in_background)

    def advance(self) -> bool:
        """Publish once all parts are written, and end once it is published; whether it is complete.
        Collective."""
        if self._is_written:
            self.task.result()
            self._attempt.synchronize(self._writing)
            if self._communicator.rank == 0:
                gib, seconds = self._bytes / 2**30, time.monotonic() - self._started
                logger.info("saved %s: %.2f GiB in %.1f s", self.final, gib, seconds)
            return True

        gathered = self._attempt.synchronize(self._writing, result=self.task.result())
        self._is_written = True
        if self._communicator.rank != 0:
            self.task = Task()
            return False
        meta = _make_meta(self._step, self._layout, self._shapes, gathered, self._state_json)
        self._bytes = sum(record.bytes for record in meta.files.values())
        # Fails if the ranks have not written every value once.
        self._attempt.run(self._writing, lambda: SavedState(self._writing, meta))

        def publish_folder() -> Any:
            result = self._attempt.run(self.final, lambda: publish(self._writing, self.final, meta))
            if not self._attempt.has_failed:
                remove_old_checkpoints(self.final.parent, self._keep)
            return result

        self.task = Task(publish_folder, in_background=self.task.in_background)
        return False


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
        sizes = {kind: len(values) for kind, values in fragment.values.items()}
        if set(sizes.values()) != {count} or (fragment.steps and not sizes.keys() >= set(MOMENTS)):
            raise CheckpointError(
                f"the engine has an incomplete state of {fragment.name!r}: {sizes}; checkpoints do "
                f"not support its DeepSpeed settings"
            )
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
