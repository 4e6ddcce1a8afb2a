"""The same work on many shards, in several processes.

Processes come from a fork server, so they start without anything of this one: a forked child could not
use an object store any more. A script that starts them needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_pipeline.common.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

Part = tuple[int, int]
"""Which share of the work: number (from 0), and how many shares there are."""
WHOLE: Part = (0, 1)


def as_done(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[tuple[int, Result]]:
    """Each job's number and `work(job)`, in the order in which they are done.

    Args:
        work: A function or object that can be sent to a process; its errors are raised here.
        jobs: Taken only a few at a time, so they may be made as they are needed.
        workers: Processes; below 2 the work is done in this one.

    Raises:
        DataError: A process was killed, most often for want of memory.
    """
    if workers < 2:
        for number, job in enumerate(jobs):
            yield number, work(job)
        return
    context, stream = multiprocessing.get_context("forkserver"), enumerate(jobs)
    pool = ProcessPoolExecutor(workers, mp_context=context)
    waiting: dict[Future[Result], int] = {}
    try:
        while True:
            while len(waiting) < 2 * workers and (found := next(stream, None)) is not None:
                number, job = found
                waiting[pool.submit(work, job)] = number
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory (use fewer workers), or could not start because "
            "the script that asked for it has no `if __name__ == \"__main__\":`"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
