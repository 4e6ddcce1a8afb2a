"""Benchmark timing: candidates run alternately, in CPU seconds, and results are medians with
quartiles.

The speed of a machine varies with clock frequency and with other load. So candidates are not timed
one after another but in rounds: each round runs every candidate once, in alternating order. Ratios
are taken within a round; the median and the quartiles over all rounds are reported. CPU seconds
exclude time in which another program held the core, but not its effect on caches and memory
bandwidth.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tools.process_stats import tree_cpu_seconds
from tools.reporting import format_number

MIN_REPEATS = 20
"""Minimum number of rounds for a ratio that is published."""
IDLE_CPU_FRACTION = 0.14
"""A process whose CPU time grows by less than this fraction of wall time counts as idle."""


class Quartiles(NamedTuple):
    """25th, 50th and 75th percentile of measured values."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        """Compute the quartiles of `values` by linear interpolation."""
        import numpy as np  # here, so that formatting results needs no package

        low, median, high = np.percentile(np.asarray(values, np.float64), (25, 50, 75)).tolist()
        return Quartiles(low, median, high)

    def __str__(self) -> str:
        low, median, high = map(format_number, self)
        return f"{median} ({low} to {high})"


class Clock(NamedTuple):
    """A counter of CPU seconds."""

    read: Callable[[], float]
    poll_seconds: float
    """Interval between two reads while waiting for all threads and processes to become idle."""
    resolution: float
    """Seconds; shorter durations are reported as this value."""


PROCESS_CLOCK = Clock(time.process_time, 0.02, 1e-6)
"""CPU time of all threads of this process."""
PROCESS_TREE_CLOCK = Clock(tree_cpu_seconds, 0.15, 0.01)
"""CPU time of this process and its descendants, in ticks of 10 ms: for work of a second or more."""

Stopwatch = Callable[[Callable[[], object]], float]
"""Runs a function and returns the seconds that it took."""


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    clock: Clock | None = None,
    stopwatch: Stopwatch | None = None,
) -> dict[str, list[float]]:
    """Run every candidate once per round, reversing the order each round (A B, B A, A B, ...).

    Args:
        candidates: Functions by name; every call must do the same amount of work.
        repeats: Rounds that are recorded.
        warmup: Rounds before those, not recorded.
        clock: Clock of CPU seconds; `PROCESS_CLOCK` if None.
        stopwatch: Replaces the CPU clock, for example `gpu_seconds`.

    Returns:
        Seconds of each recorded round, by candidate.
    """
    cpu_clock = clock or PROCESS_CLOCK
    stopwatch = stopwatch or (lambda work: cpu_seconds(work, cpu_clock))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}

    # Objects that already exist are excluded from the collections inside the loop.
    gc.collect()
    gc.freeze()
    for round_index in range(-warmup, repeats):
        names = list(candidates)
        for name in names if round_index % 2 == 0 else reversed(names):
            # Garbage of the previous candidate must not be collected in this one's time.
            gc.collect()
            elapsed = stopwatch(candidates[name])
            if round_index >= 0:
                seconds[name].append(elapsed)
    gc.unfreeze()
    return seconds


def cpu_seconds(work: Callable[[], object], clock: Clock) -> float:
    """CPU seconds of one run, including background work that it leaves running.

    Data loaders prefetch in threads or processes. Measured from idle to idle, the time includes the
    preparation of one prefetched sample per consumed sample, and no work of this candidate is
    counted for the next one.
    """
    before = _read_when_idle(clock)
    work()
    return max(clock.resolution, _read_when_idle(clock) - before)


def gpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of one run on the GPU, between events on an idle stream.

    Includes time in which the GPU waits for the host.
    """
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _read_when_idle(clock: Clock) -> float:
    """Poll until CPU time stops growing; return the last reading."""
    last = clock.read()
    while True:
        time.sleep(clock.poll_seconds)
        now = clock.read()
        if now - last <= IDLE_CPU_FRACTION * clock.poll_seconds:
            return now
        last = now


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Quartiles:
    """Speedup of `fast` over `slow`: quartiles of the ratios within each round."""
    return Quartiles.of([a / b for a, b in zip(slow, fast, strict=True)])


def use_one_thread() -> None:
    """Limit OpenCV and torch to one thread, so that CPU seconds are those of one core."""
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
