"""The same work on many things, in several processes, with the answers in order.

Processes come from a fork server: a forked one could not use an object store any more. What is sent to
them must be small, so jobs name shards instead of holding them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_pipeline.common.errors import ConfigError, DataError

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Part = tuple[int, int]
"""Which share of the work: number (from 0) and how many shares."""
WHOLE: Part = (0, 1)


def in_processes(work: Callable[[Job], Answer], jobs: Iterable[Job], workers: int) -> Iterator[Answer]:
    """`work(job)` for every job, in order; at most `2 * workers` are under way.

    Args:
        work: A function or object that can be sent to a process; its errors are raised here.
        jobs: Taken only as they are needed.
        workers: Processes; 0 does the work in this one.

    Raises:
        DataError: A process was killed, most often for want of memory.
    """
    if workers <= 0:
        for job in jobs:
            yield work(job)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.preparing.visit"])  # imported once, not by every process
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(dict(os.environ),)) as pool:
        waiting: deque[Future[Answer]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory; use fewer --workers, or a job with more"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(environment: dict[str, str]) -> None:
    """One thread a process: the processes are as many as the CPUs. Ctrl-C is the parent's to answer."""
    import cv2

    # The fork server may be older than what the environment says now, such as credentials of a store.
    os.environ.clear()
    os.environ.update(environment)
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def default_workers() -> int:
    """One process a CPU that this process may use; in a SLURM job, that it asked for."""
    cpus, asked = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cpus, int(asked)) if asked.isdigit() and int(asked) else max(1, cpus)


def parse_part(text: str) -> Part:
    """`I/N`, the share I (from 0) of N.

    Raises:
        ConfigError: It is none.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ConfigError(
            f"--part {text}: give I/N with I from 0 to N - 1, as in --part "
            f"$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT of a job submitted with --array=0-7"
        )
    return int(number), int(count)
