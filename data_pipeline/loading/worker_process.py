"""Worker processes that build batches: how they start, handle signals, return errors
and exit.

A scheduler sends its signals to every process of a job, but the trainer still needs batches while
it saves a checkpoint. From their start, workers therefore react only to signals of their trainer.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import NamedTuple

import torch

from data_pipeline.common.errors import VlmError, error_from_values

JOB_SIGNALS = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
"""Signals that a user or a scheduler sends to all processes of a job."""


class WorkerError(NamedTuple):
    """An error that a worker returns as a value; torch would pass on a raised one only as the text
    of its traceback."""

    values: tuple[str, ...]
    """See `error_values`."""

    def error(self) -> VlmError:
        """The original error."""
        return error_from_values(self.values)


def fork_server(*, preload: str) -> ForkServerContext:
    """A context that starts workers from a fork server with `preload` imported and `JOB_SIGNALS`
    blocked.

    Workers inherit the blocked signals. Otherwise a job that is signaled during startup would lose
    the workers that have not called `prepare_worker` yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # Started first, because starting it unblocks some of these signals.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context


def prepare_worker(worker: int) -> None:
    """Set up a worker: one thread, no reaction to job signals, exit with the trainer."""
    for name in JOB_SIGNALS - {signal.SIGTERM}:
        signal.signal(name, signal.SIG_IGN)
    # Blocked before other threads start, which inherit the mask; `_exit_on_trainer_sigterm` waits
    # for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    # The parent of a worker is the fork server, so `getppid` does not show that the trainer ended.
    for function in (_exit_with_trainer, _exit_on_trainer_sigterm):
        threading.Thread(target=function, daemon=True).start()

    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(0)


def _exit_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _exit_on_trainer_sigterm() -> None:
    """Exit on SIGTERM from the trainer, even during a read that never returns; ignore SIGTERM from
    other processes.

    Python waits for its children at exit, so a worker that cannot be terminated would block it
    forever.
    """
    trainer = multiprocessing.parent_process()
    while trainer is not None:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == trainer.pid:
            os._exit(0)
