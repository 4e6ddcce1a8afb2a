"""A long run of the loader with two workers: does memory, or anything else that is counted, grow?

Small pictures and a small set of shards, epoch after epoch, with a window of shards so small that
files are opened and closed all the time. Every so often all processes are looked at; what matters
is the slope of a straight line through their resident sets after the warm-up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.bench_loader.figures import Figure, Options
from tools.bench_loader.loading import batches_of, our_loader
from tools.bench_loader.workloads import SMALL, DataSet, prepare
from tools.benchmark import Quartiles, family, one_thread, resident_bytes

SAMPLES, WORKERS, LOOKS = 1_000_000, 2, 50
WARM_UP = 0.25
"""Share of the run in which allocators and caches may still fill."""
LIMIT_MIB = 1.0
TINY = replace(
    SMALL,
    name="tiny",
    what="16 px, 0.7 KB -> 16 px",
    sides=((16, 16),),
    image_size=16,
    samples=2400,
    shards=24,
    batch=256,
)
WINDOW = 4


class Look(NamedTuple):
    """One process at one moment."""

    samples: int
    """Samples that were delivered by then."""
    resident: int
    """Bytes."""
    files: int
    """Open file descriptors."""
    threads: int
    shared: int
    """Pieces of /dev/shm that it has mapped."""


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What was seen."""

    looks: dict[int, list[Look]]
    """By process: the trainer first, then what descends from it."""
    samples: int
    problems: int
    seconds: float
    left_in_shm: tuple[str, ...]
    """Entries of /dev/shm with the number of one of the processes, after all have ended."""

    def per_100k(self, pid: int, count: str) -> float:
        """Slope of a straight line through one count of a process after the warm-up.

        Args:
            pid: Which process.
            count: Field of `Look`.

        Returns:
            How much it grows while the whole loader delivers 100,000 samples.
        """
        looks = [look for look in self.looks[pid] if look.samples >= WARM_UP * self.samples]
        line = np.polyfit(
            [look.samples / 1e5 for look in looks], [getattr(look, count) for look in looks], 1
        )
        return float(line[0])

    def steepest(self, count: str) -> float:
        """The largest `per_100k` of all processes."""
        return max(self.per_100k(pid, count) for pid in self.looks)


def measure(options: Options) -> Iterator[Figure]:
    """The slope of the process that grows fastest."""
    data = prepare(TINY, options.root)
    soak = run(data, 20_000 if options.quick else SAMPLES)
    slopes = [soak.per_100k(pid, "resident") / 2**20 for pid in soak.looks]
    others = ", ".join(
        f"{name} {soak.steepest(name):+.2f}" for name in ("files", "threads", "shared")
    )
    yield Figure(
        name=f"memory growth over {soak.samples:,} samples, {WORKERS} workers",
        unit="MiB/100k samples",
        value=Quartiles(min(slopes), max(slopes), max(slopes)),
        floor=LIMIT_MIB,
        less_is_better=True,
        note=f"the steepest of {len(slopes)} processes; others the same way: {others}; "
        f"{soak.samples / soak.seconds:,.0f} samples/s",
    )


def run(data: DataSet, samples: int) -> Soak:
    """Deliver that many samples (rounded up to whole batches) and look at the processes all the
    while."""
    one_thread()
    loader = our_loader(data, TINY, workers=WORKERS, shuffle_window=WINDOW)
    stream, start = batches_of(loader), time.perf_counter()
    next(stream)
    pids = family()
    looks: dict[int, list[Look]] = {pid: [] for pid in pids}
    delivered, problems, due = TINY.batch, 0, 0
    while delivered < samples:
        batch = next(stream)
        delivered += len(batch.images)
        problems += len(batch.problems)
        if delivered >= due:
            due += samples // LOOKS
            for pid in pids:
                looks[pid].append(look(pid, delivered))
    seconds = time.perf_counter() - start
    loader.close()
    marks = [f"_{pid}_" for pid in pids]
    left = tuple(name for name in os.listdir("/dev/shm") if any(mark in name for mark in marks))
    return Soak(
        looks=looks, samples=delivered, problems=problems, seconds=seconds, left_in_shm=left
    )


def look(pid: int, samples: int) -> Look:
    """Look at a process now."""
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Look(
        samples=samples,
        resident=resident_bytes(pid),
        files=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        shared=(folder / "maps").read_text().count("/dev/shm/"),
    )
