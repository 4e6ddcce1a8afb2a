"""CPU seconds per sample with worker processes, as in training, summed over all processes.

Compared with loading in one process, this adds the transfer of batches to the trainer. All loaders
use torch's DataLoader with two workers. CPU time of the process tree is measured from a point where
all prefetched batches are ready to the next such point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tools.bench_loader import peers
from tools.bench_loader.options import Options
from tools.bench_loader.throughput import SPEED_TARGETS, batch_consumer, batches_of, our_loader
from tools.bench_loader.workloads import PHOTO, SMALL, WEB, Workload, prepare
from tools.measurements import Measurement
from tools.reporting import log_progress
from tools.timing import (
    PROCESS_TREE_CLOCK,
    Quartiles,
    cpu_seconds,
    interleave,
    ratio,
    use_one_thread,
)

WORKERS, PREFETCH, ROUND_SECONDS = 2, 4, 1.0


def measure(options: Options) -> Iterator[Measurement]:
    """Measure every image size."""
    use_one_thread()
    for workload in (SMALL,) if options.quick else (SMALL, WEB, PHOTO):
        log_progress(f"workers: {workload.name}")
        yield from _measure(workload.quick() if options.quick else workload, options)


def _measure(workload: Workload, options: Options) -> Iterator[Measurement]:
    data = prepare(workload, options.root)
    loader = our_loader(data, workload, workers=WORKERS, prefetch=PREFETCH)
    streams: dict[str, Iterator[Any]] = {
        "ours": batches_of(loader),
        "webdataset": _in_workers(peers.webdataset_pipeline(data, workload, shuffle=True)),
        "webdataset and Pillow": _in_workers(peers.pillow_pipeline(data, workload)),
    }
    batches = 2 if options.quick else _batches_per_round(streams["webdataset"])
    candidates = {name: batch_consumer(stream, batches) for name, stream in streams.items()}
    seconds = interleave(candidates, repeats=options.repeats, warmup=1, clock=PROCESS_TREE_CLOCK)
    loader.close()
    del streams, candidates

    for name, rounds in seconds.items():
        yield Measurement(
            name=f"{workload.name}: {name}",
            unit="samples/s/core",
            value=Quartiles.of([batches * workload.batch / duration for duration in rounds]),
        )
    for name in ("webdataset", "webdataset and Pillow"):
        floor, goal = SPEED_TARGETS[name]
        yield Measurement(
            name=f"{workload.name}: ours / {name}",
            unit="x",
            floor=floor,
            goal=goal,
            value=ratio(seconds[name], seconds["ours"]),
        )


def _in_workers(pipeline: Any) -> Iterator[Any]:
    """Batches made in torch's workers, as webdataset's documentation recommends."""
    return iter(
        torch.utils.data.DataLoader(
            pipeline,
            batch_size=None,
            num_workers=WORKERS,
            prefetch_factor=PREFETCH,
            multiprocessing_context="forkserver",
            worker_init_fn=_use_one_thread,
        )
    )


def _batches_per_round(stream: Iterator[Any]) -> int:
    """Number of batches that take about `ROUND_SECONDS` of CPU time in total.

    A clock tick of 10 ms is then about 1 % of a round.
    """
    seconds = cpu_seconds(batch_consumer(stream, 16), PROCESS_TREE_CLOCK)
    return max(4, round(16 * ROUND_SECONDS / seconds))


def _use_one_thread(_worker: int) -> None:
    use_one_thread()
