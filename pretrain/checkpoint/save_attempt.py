"""Errors while a checkpoint is saved: one on any rank is raised on every rank."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.common.tables import counted
from pretrain.checkpoint.reader import find_latest
from pretrain.parallel.communicator import Communicator
from pretrain.parallel.errors import CheckpointError


class SaveAttempt:
    """Collects the errors of this rank until all ranks exchange them."""

    def __init__(self, communicator: Communicator, *, root: Path, step: int) -> None:
        self._communicator, self._root, self._step = communicator, root, step
        self._problem: str | None = None
        self._cause: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether an operation of this rank failed."""
        return self._problem is not None

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
