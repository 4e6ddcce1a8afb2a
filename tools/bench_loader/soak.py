"""Soak test: a long run of the loader with two workers, to detect growth of memory or other
resources.

Images and shards are small and repeat for many epochs. A small shuffle window forces files to be
opened and closed continuously. All processes are sampled at intervals; the result is the slope of a
line fitted to each resource after the warm-up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.bench_loader.options import Options
from tools.bench_loader.throughput import batches_of, our_loader
from tools.bench_loader.workloads import SMALL, BenchmarkData, prepare
from tools.measurements import Measurement
from tools.process_stats import process_tree, resident_bytes
from tools.timing import Quartiles, use_one_thread

SAMPLES, WORKERS, NUM_SNAPSHOTS = 1_000_000, 2, 50
WARMUP_FRACTION = 0.25
"""Initial fraction of the run, excluded because allocators and caches still fill."""
LIMIT_MIB = 1.0
TINY = replace(
    SMALL,
    name="tiny",
    description="16 px, 0.7 KB -> 16 px",
    sizes=((16, 16),),
    image_size=16,
    samples=2400,
    shards=24,
    batch=256,
)
SHUFFLE_WINDOW = 4


class Snapshot(NamedTuple):
    """Resources of one process at one time."""

    samples: int
    """Samples that the loader has delivered so far."""
    resident: int
    """Resident set size, bytes."""
    files: int
    """Open file descriptors."""
    threads: int
    shm_mappings: int
    """Mapped files of /dev/shm."""


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Result of a soak test."""

    snapshots: dict[int, list[Snapshot]]
    """By process ID, of the trainer and all of its descendants."""
    samples: int
    problems: int
    """Samples that could not be read."""
    seconds: float
    leaked_shm: tuple[str, ...]
    """Entries of /dev/shm, named after one of the processes, that remain after all have ended."""

    def growth_per_100k(self, pid: int, resource: str) -> float:
        """Growth of one resource of a process per 100,000 samples of the whole loader.

        Args:
            pid: Process ID.
            resource: Field of `Snapshot`.

        Returns:
            Slope of a least-squares line through the snapshots after the warm-up.
        """
        first = WARMUP_FRACTION * self.samples
        snapshots = [snapshot for snapshot in self.snapshots[pid] if snapshot.samples >= first]
        samples = [snapshot.samples / 1e5 for snapshot in snapshots]
        values = [getattr(snapshot, resource) for snapshot in snapshots]
        return float(np.polyfit(samples, values, 1)[0])

    def max_growth(self, resource: str) -> float:
        """Maximum of `growth_per_100k` over all processes."""
        return max(self.growth_per_100k(pid, resource) for pid in self.snapshots)


def measure(options: Options) -> Iterator[Measurement]:
    """Measure the memory growth of the fastest-growing process."""
    data = prepare(TINY, options.root)
    soak = run(data, 20_000 if options.quick else SAMPLES)
    slopes = [soak.growth_per_100k(pid, "resident") / 2**20 for pid in soak.snapshots]
    others = ", ".join(
        f"{name} {soak.max_growth(name):+.2f}" for name in ("files", "threads", "shm_mappings")
    )
    yield Measurement(
        name=f"memory growth over {soak.samples:,} samples, {WORKERS} workers",
        unit="MiB/100k samples",
        value=Quartiles(min(slopes), max(slopes), max(slopes)),
        floor=LIMIT_MIB,
        less_is_better=True,
        note=f"maximum of {len(slopes)} processes; likewise {others}; "
        f"{soak.samples / soak.seconds:,.0f} samples/s",
    )


def run(data: BenchmarkData, samples: int) -> Soak:
    """Load `samples` samples (rounded up to whole batches), taking snapshots of all processes."""
    use_one_thread()
    loader = our_loader(data, TINY, workers=WORKERS, shuffle_window=SHUFFLE_WINDOW)
    stream, start = batches_of(loader), time.perf_counter()
    next(stream)

    pids = process_tree()
    snapshots: dict[int, list[Snapshot]] = {pid: [] for pid in pids}
    delivered, problems, next_snapshot = TINY.batch, 0, 0
    while delivered < samples:
        batch = next(stream)
        delivered += len(batch.images)
        problems += len(batch.problems)
        if delivered >= next_snapshot:
            next_snapshot += samples // NUM_SNAPSHOTS
            for pid in pids:
                snapshots[pid].append(take_snapshot(pid, delivered))

    seconds = time.perf_counter() - start
    loader.close()
    return Soak(
        snapshots=snapshots,
        samples=delivered,
        problems=problems,
        seconds=seconds,
        leaked_shm=_shm_entries_of(pids),
    )


def take_snapshot(pid: int, samples: int) -> Snapshot:
    """Read the current resources of a process."""
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Snapshot(
        samples=samples,
        resident=resident_bytes(pid),
        files=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        shm_mappings=(folder / "maps").read_text().count("/dev/shm/"),
    )


def _shm_entries_of(pids: list[int]) -> tuple[str, ...]:
    patterns = [f"_{pid}_" for pid in pids]
    names = os.listdir("/dev/shm")
    return tuple(name for name in names if any(pattern in name for pattern in patterns))
