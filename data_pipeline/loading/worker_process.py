"""The processes that make batches: how they are born, what they do with signals, and when they end.

A scheduler signals every process of a job; the trainer still needs batches while it saves, so
workers listen to their trainer alone, from their first moment on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

import torch

SIGNALS_OF_THE_JOB = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
"""What a person or a scheduler sends to all processes of a job."""


def fork_server(*, preload: str) -> ForkServerContext:
    """Where workers come from: a process that has imported `preload` once, with the job's signals
    blocked.

    Its copies have them blocked from their birth. Without that, a job told to stop while it starts
    would lose the workers that have not come to `prepare_worker` yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    resource_tracker.ensure_running()  # first: whatever starts it unblocks some of these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_JOB)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def prepare_worker(worker: int) -> None:
    """One thread a worker, deaf to the signals meant for the trainer, and no life without it."""
    for name in SIGNALS_OF_THE_JOB - {signal.SIGTERM}:
        signal.signal(name, signal.SIG_IGN)
    # Blocked before there are other threads, which inherit that: `_end_when_the_trainer_asks` takes
    # it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    # A child of the fork server does not notice the end of the trainer by its parent's number.
    for watch in (_end_with_the_trainer, _end_when_the_trainer_asks):
        threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(0)


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _end_when_the_trainer_asks() -> None:
    """End by the trainer's SIGTERM, also in the middle of a read that never returns; others' are
    ignored.

    Python waits for its children before it exits: a worker that cannot be ended would keep it for
    ever.
    """
    trainer = multiprocessing.parent_process()
    while trainer is not None:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == trainer.pid:
            os._exit(0)
