"""Honest timing: contestants take turns, CPU seconds beside wall seconds, medians with their
spread.

A machine is never quiet: clocks change, other programs come and go. So A and B are not measured one
after the other but in rounds, each of which runs every contestant once, in alternating order;
figures are ratios within a round, and of many rounds the median and the quartiles are told. CPU
seconds leave out the time in which another program had the core; they still feel its use of caches
and memory.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

MIN_REPEATS = 20
"""Rounds below which a ratio is no figure to publish."""


class Quartiles(NamedTuple):
    """Of some measured values."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        """The 25th, 50th and 75th percentile."""
        import numpy as np  # here, so that what only tells figures needs no package at all

        low, median, high = np.percentile(np.asarray(values, np.float64), (25, 50, 75)).tolist()
        return Quartiles(low, median, high)

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.low)} to {figure(self.high)})"


class Clock(NamedTuple):
    """How CPU seconds are read."""

    read: Callable[[], float]
    pause: float
    """Seconds between two looks whether all threads and processes have come to rest."""
    resolution: float
    """Seconds; what takes less is told as this."""


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    clock: Clock | None = None,
    stopwatch: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Run every contestant once a round, in an order that turns round each time (A B, B A, A B,
    ...).

    Args:
        contestants: What to run, by name; each call must do the same work again.
        repeats: Rounds that count.
        warmup: Rounds before those.
        clock: What CPU seconds are counted; `PROCESS` if None.
        stopwatch: What takes the time of one run instead, such as `gpu_seconds`.

    Returns:
        By name, the seconds of each round.
    """
    counted = clock or PROCESS
    stopwatch = stopwatch or (lambda work: cpu_seconds(work, counted))
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    # What is there by now need not be looked at again and again.
    gc.collect()
    gc.freeze()
    for number in range(-warmup, repeats):
        names = list(contestants)
        for name in names if number % 2 == 0 else reversed(names):
            # What another contestant left to collect is not this one's work.
            gc.collect()
            seconds = stopwatch(contestants[name])
            if number >= 0:
                taken[name].append(seconds)
    gc.unfreeze()
    return taken


def cpu_seconds(work: Callable[[], object], clock: Clock) -> float:
    """What one run takes, up to the moment when nothing works on in the background.

    Loaders prepare ahead, in threads or processes. From rest to rest, every sample that is taken
    costs the preparation of one other, and nothing is left that the next contestant would pay for.
    """
    before = _at_rest(clock)
    work()
    return max(clock.resolution, _at_rest(clock) - before)


def gpu_seconds(work: Callable[[], object]) -> float:
    """What one run takes on the GPU, from an idle stream to an idle stream, waiting for the host
    included."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _at_rest(clock: Clock) -> float:
    last = clock.read()
    while True:
        time.sleep(clock.pause)
        now = clock.read()
        if now - last <= 0.14 * clock.pause:
            return now
        last = now


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Quartiles:
    """How many times faster `fast` was: quartiles of the ratios within each round."""
    return Quartiles.of([a / b for a, b in zip(slow, fast, strict=True)])


def family_cpu_seconds(pid: int | None = None) -> float:
    """CPU seconds of a process and all that descend from it, those that ended and were waited for
    included.

    `resource.getrusage` knows children only once they have ended. Resolution: one clock tick (10
    ms).
    """
    tick = os.sysconf("SC_CLK_TCK")
    return sum(sum(times) for times in _family(pid or os.getpid()).values()) / tick


PROCESS = Clock(time.process_time, 0.02, 1e-6)
"""All threads of this process."""
FAMILY = Clock(family_cpu_seconds, 0.15, 0.01)
"""This process and all that descend from it; in ticks of 10 ms, so work for a second or more."""


def family(pid: int | None = None) -> list[int]:
    """A process and all that descend from it and still live."""
    return list(_family(pid or os.getpid()))


def _family(root: int) -> dict[int, tuple[int, int, int, int]]:
    """Clock ticks (own user, own system, ended children's user and system) by process."""
    parents: dict[int, int] = {}
    ticks: dict[int, tuple[int, int, int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name in brackets may hold anything; fields are counted from behind it.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            parents[int(entry.name)] = int(fields[1])
            user, system, ended_user, ended_system = map(int, fields[11:15])
            ticks[int(entry.name)] = (user, system, ended_user, ended_system)
    found = {root} if root in ticks else set[int]()
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: ticks[pid] for pid in found}


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever held (its resident set), bytes."""
    return _memory(pid, "VmHWM")


def resident_bytes(pid: int) -> int:
    """The memory that a process holds now (its resident set), bytes."""
    return _memory(pid, "VmRSS")


def _memory(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/{pid}/status has no {field}")


def one_thread() -> None:
    """One thread for all the libraries that would start more, so that CPU seconds are those of one
    core."""
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures were measured on, for the report."""
    cpu = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
        )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "nice": os.nice(0),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def version(package: str) -> str:
    """Of an installed package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def figure(value: float) -> str:
    """A number with three or so digits that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A Markdown table, its columns lined up for readers of plain text."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [[*head], ["-" * width for width in widths], *map(list, rows)]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def note(text: str) -> None:
    """Say what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)
