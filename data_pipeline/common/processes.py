"""The same work on many things, in several processes; how many there may be; and shares of work for
job arrays.

Processes come from a fork server: a forked one could not use an object store any more. What is sent
to them must be small, so jobs name shards instead of holding them. A script that starts them needs
`if __name__ == "__main__":`.
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
Answer = TypeVar("Answer")
Part = tuple[int, int]
"""Which share of the work: number (from 0) and how many shares."""
WHOLE: Part = (0, 1)

_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
)
"""What libraries ask when they are imported."""


def in_processes(
    work: Callable[[Job], Answer], jobs: Iterable[Job], workers: int, *, ordered: bool = True
) -> Iterator[tuple[int, Answer]]:
    """Each job's number and `work(job)`; at most `2 * workers` are under way.

    Args:
        work: A function or object that can be sent to a process; its errors are raised here.
        jobs: Taken only as they are needed.
        workers: Processes; 0 does the work in this one.
        ordered: Answers come in the order of the jobs; if not, as they are done.

    Raises:
        DataError: A process was killed, most often for want of memory.
    """
    if workers <= 0:
        for number, job in enumerate(jobs):
            yield number, work(job)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_module_of(work)])  # imported once, not by every process
    stream = enumerate(jobs)
    waiting: dict[Future[Answer], int] = {}  # in the order of the jobs
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(dict(os.environ),)
    ) as pool:
        try:
            while True:
                while len(waiting) < 2 * workers and (found := next(stream, None)) is not None:
                    waiting[pool.submit(work, found[1])] = found[0]
                if not waiting:
                    return
                done = (
                    [next(iter(waiting))]
                    if ordered
                    else wait(waiting, return_when=FIRST_COMPLETED).done
                )
                for future in done:
                    answer = future.result()
                    yield waiting.pop(future), answer
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory (use fewer --workers, or a job with more), "
                'or could not start because the script that asked for it has no `if __name__ == "__main__":`'
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def usable_cpus() -> int:
    """CPUs that this process may use; in a SLURM job, no more than its task asked for."""
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, int(asked)) if asked.isdigit() and int(asked) else cpus)


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


def _start(environment: dict[str, str]) -> None:
    """Begin a process: the environment of now, one thread, and Ctrl-C is the parent's to answer."""
    # The fork server may be older than what the environment says now, such as credentials of a
    # store.
    os.environ.clear()
    os.environ.update(environment | dict.fromkeys(_ONE_THREAD, "1"))
    # Too late for what the fork server has imported already.
    for name, set_threads in (("cv2", "setNumThreads"), ("torch", "set_num_threads")):
        if module := sys.modules.get(name):
            getattr(module, set_threads)(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _module_of(work: Callable[..., Any]) -> str:
    return str((work.func if isinstance(work, partial) else work).__module__)
