"""Parallel work: mapping a function over jobs in processes, and parts of work for job arrays.

Processes are started by a fork server, because object-store clients do not work after a fork. Jobs
are pickled and sent to them, so they must be small: they name shards instead of containing them. A
script that uses this needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from data_pipeline.common.errors import ConfigError, DataError

Job = TypeVar("Job")
Result = TypeVar("Result")
Part = tuple[int, int]
"""One part of the work, as `(index, count)`; the index starts at 0."""
SINGLE_PART: Part = (0, 1)

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
)
"""Environment variables that libraries read on import."""


def map_in_processes(
    work: Callable[[Job], Result], jobs: Iterable[Job], workers: int, *, ordered: bool = True
) -> Iterator[tuple[int, Result]]:
    """Yield `(index, work(job))` for each job; at most `2 * workers` jobs are in flight.

    Args:
        work: A picklable function or object; its exceptions are raised here.
        jobs: Consumed only as needed.
        workers: Number of processes; 0 does the work in this process.
        ordered: Yield results in the order of the jobs; otherwise as they complete.

    Raises:
        DataError: A process was killed, most often because memory ran out.
    """
    if workers <= 0:
        for index, job in enumerate(jobs):
            yield index, work(job)
        return

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_module_of(work)])  # imported once, not by every process
    indexed_jobs = enumerate(jobs)
    pending: dict[Future[Result], int] = {}  # in the order of the jobs
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_initialize, initargs=(dict(os.environ),)
    ) as pool:
        try:
            while True:
                while len(pending) < 2 * workers and (item := next(indexed_jobs, None)) is not None:
                    pending[pool.submit(work, item[1])] = item[0]
                if not pending:
                    return
                for future in _completed(pending, ordered):
                    result = future.result()
                    yield pending.pop(future), result
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps because memory ran out (use fewer --workers "
                "or request more memory), or it could not start because the calling script has no "
                '`if __name__ == "__main__":`'
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def usable_cpus() -> int:
    """Number of CPUs that this process may use; in a SLURM job at most those of its task."""
    requested = os.environ.get("SLURM_CPUS_PER_TASK", "")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if requested.isdigit() and int(requested):
        cpus = min(cpus, int(requested))
    return max(1, cpus)


def parse_part(text: str) -> Part:
    """Parse `I/N`: part I (from 0) of N.

    Raises:
        ConfigError: The text has another form, or I is not below N.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(
            f"--part {text}: give I/N with I from 0 to N - 1, as in --part "
            f"$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT of a job submitted with --array=0-7"
        )
    return int(index), int(count)


def _completed(pending: dict[Future[Result], int], ordered: bool) -> Iterable[Future[Result]]:
    """The next futures to return: the first job's, or those that are done."""
    if ordered:
        return [next(iter(pending))]
    return wait(pending, return_when=FIRST_COMPLETED).done


def _initialize(environment: dict[str, str]) -> None:
    """Prepare a worker process: current environment, one thread, Ctrl-C is left to the parent."""
    # The fork server may have started before the environment changed, e.g. credentials of a store.
    os.environ.clear()
    os.environ.update(environment | dict.fromkeys(_THREAD_VARIABLES, "1"))
    # The variables have no effect on modules that the fork server has already imported.
    for name, set_threads in (("cv2", "setNumThreads"), ("torch", "set_num_threads")):
        if module := sys.modules.get(name):
            getattr(module, set_threads)(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _module_of(work: Callable[..., Any]) -> str:
    return str((work.func if isinstance(work, partial) else work).__module__)
