"""Saves a checkpoint so that a kill, a power cut or a full disk at any moment costs at most this
one.

    every rank   writes its files into .writing-step-N and forces them to the disk
    all ranks    tell each other sizes, hashes and errors
    rank 0       writes meta.json, renames the folder to step-N, then points `latest` at it
    all ranks    learn how that went

Until the folder has its name it is nothing, and until `latest` is replaced the previous checkpoint
is the one to go on from. If anything fails on any rank, every rank raises the same error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import CheckpointError
from pretrain.checkpoint.format import (
    LATEST,
    META,
    REPLACED_PREFIX,
    WRITING_PREFIX,
    CheckpointEngine,
    FileRecord,
    Meta,
    model_file,
    optimizer_file,
    rank_file,
    step_name,
    sync_folder,
    write_file,
    write_json,
    write_tensors,
)
from pretrain.checkpoint.reader import find_latest
from pretrain.checkpoint.retention import clear_leftovers, remove_old

logger = logging.getLogger(__name__)


def save(
    engine: CheckpointEngine,
    *,
    root: Path,
    step: int,
    state_json: dict[str, Any],
    rank_state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Save one checkpoint; collective over all ranks.

    Args:
        engine: Gives this rank's tensors and talks to the other ranks.
        root: The `checkpoints` folder of the run, on a disk that all ranks share.
        step: Optimizer steps done.
        state_json: What the training loop wants back; rank 0's counts.
        rank_state: What this rank wants back, random states for example.
        keep: Newest checkpoints that stay.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: On every rank alike, when any rank could not write. Nothing of this
            checkpoint stays, and `latest` is as it was.
    """
    started = time.monotonic()
    writing, final = root / (WRITING_PREFIX + step_name(step)), root / step_name(step)
    attempt = _Attempt(engine, root=root, step=step)
    if engine.rank == 0:
        attempt.run(str(writing), lambda: _open_folder(writing))
    attempt.settle(writing)

    files: dict[str, FileRecord] = {}

    def keep_record(name: str, write: Callable[[Path], FileRecord]) -> None:
        record = attempt.run(str(writing / name), lambda: write(writing / name))
        if record is not None:
            files[name] = record

    # Both calls are collective, so they are made even where the disk already failed.
    model = engine.model_tensors()
    if model:
        keep_record(model_file(engine.rank), lambda path: write_tensors(path, model))
    optimizer = engine.optimizer_tensors()
    if optimizer:
        keep_record(optimizer_file(engine.rank), lambda path: write_tensors(path, optimizer))
    keep_record(rank_file(engine.rank), lambda path: write_json(path, rank_state))
    gathered = attempt.settle(
        writing, result={name: record._asdict() for name, record in files.items()}
    )

    if engine.rank == 0:
        records = {name: FileRecord(**record) for part in gathered for name, record in part.items()}
        meta = Meta(step=step, layout=engine.layout.to_json(), files=records, state=state_json)
        attempt.run(str(final), lambda: _publish(writing, final, meta))
    attempt.settle(writing)

    if engine.rank == 0:
        remove_old(root, keep)
        gib = sum(record.bytes for record in records.values()) / 2**30
        logger.info("saved %s: %.2f GiB in %.1f s", final, gib, time.monotonic() - started)
    return final


class _Attempt:
    """Collects what goes wrong on this rank until all ranks compare notes."""

    def __init__(self, engine: CheckpointEngine, *, root: Path, step: int) -> None:
        self._engine, self._root, self._step = engine, root, step
        self._problem: str | None = None
        self._cause: Exception | None = None

    def run(self, what: str, write: Callable[[], Any]) -> Any:
        """Do one thing unless an earlier one failed; give its result, or None after a failure."""
        if self._problem is not None:
            return None
        try:
            return write()
        except Exception as error:  # noqa: BLE001 - a rank that left here alone would hang the others
            self._cause = error
            reason = _explain(error, self._root)
            self._problem = f"rank {self._engine.rank} could not write {what}: {reason}"
            return None

    def settle(self, writing: Path, result: Any = None) -> list[Any]:
        """Let all ranks compare notes: give their results in rank order, or raise on all of
        them."""
        notes = self._engine.gather_json({"problem": self._problem, "result": result})
        problems = [note["problem"] for note in notes if note["problem"] is not None]
        if not problems:
            return [note["result"] for note in notes]
        previous = ""
        if self._engine.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            previous = _previous(self._root)
        # The second round says what rank 0 found, and that the folder is gone before anybody goes
        # on.
        previous = self._engine.gather_json(previous)[0]
        more = f" (and {len(problems) - 1} more ranks failed)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"checkpoint of step {self._step} was not saved: {problems[0]}{more}. {previous}"
        ) from self._cause


def _open_folder(writing: Path) -> None:
    writing.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(writing.parent)
    os.mkdir(writing)


def _publish(writing: Path, final: Path, meta: Meta) -> None:
    """Give the folder its name and point `latest` at it; undo the first if the second fails."""
    write_json(writing / META, meta.to_json())
    sync_folder(writing)
    root = final.parent
    aside = root / (REPLACED_PREFIX + final.name)
    if final.exists():
        # After a step back to an older checkpoint the same step is reached a second time.
        os.rename(final, aside)
    try:
        os.rename(writing, final)
        sync_folder(root)
        _replace_latest(root, final.name)
    except Exception:
        if final.exists():
            os.rename(final, writing)
        if aside.exists():
            os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
        sync_folder(root)
    except OSError as error:
        # Too late to undo: both names are in place, and a power cut now brings back the older one.
        logger.warning(
            "%s names %s, but the disk did not confirm it: %s", root / LATEST, name, error
        )


def _explain(error: Exception, root: Path) -> str:
    """What went wrong, and what to do about it."""
    if not isinstance(error, OSError):
        return str(error) if isinstance(error, CheckpointError) else repr(error)
    reason = f"{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(root).free / 2**20:,.1f} MiB free there)"
        return f"{reason}; free some, or lower checkpoint.keep, and start the run again to go on"
    if error.errno == errno.ENOENT:
        return f"{reason}; is the run folder on a disk that all ranks share?"
    return f"{reason}; see to that disk and start the run again to go on"


def _previous(root: Path) -> str:
    try:
        path = find_latest(root)
    except CheckpointError as error:
        return f"There is no whole earlier checkpoint: {error}"
    return (
        f"The previous checkpoint {path} is untouched and good"
        if path
        else "There is no earlier one"
    )
