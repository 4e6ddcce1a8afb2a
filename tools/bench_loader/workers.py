"""With worker processes, as in training: CPU seconds a sample of all processes together.

What comes on top of making a batch is handing it to the trainer. Both loaders use torch's
DataLoader with two workers; counted is the time of the whole family of processes from one moment in
which all batches made ahead are there to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tools.bench_loader import peers
from tools.bench_loader.figures import Figure, Options
from tools.bench_loader.loading import BOUNDS, batches_of, our_loader, taker
from tools.bench_loader.workloads import PHOTO, SMALL, WEB, Workload, prepare
from tools.benchmark import FAMILY, Quartiles, cpu_seconds, interleave, note, one_thread, ratio

WORKERS, PREFETCH, ROUND_SECONDS = 2, 4, 1.0


def measure(options: Options) -> Iterator[Figure]:
    """Every kind of picture."""
    one_thread()
    for workload in (SMALL,) if options.quick else (SMALL, WEB, PHOTO):
        note(f"workers: {workload.name}")
        yield from _measure(workload.quick() if options.quick else workload, options)


def _measure(workload: Workload, options: Options) -> Iterator[Figure]:
    data = prepare(workload, options.root)
    loader = our_loader(data, workload, workers=WORKERS, prefetch=PREFETCH)
    streams: dict[str, Iterator[Any]] = {
        "ours": batches_of(loader),
        "webdataset": _in_workers(peers.webdataset_pipeline(data, workload, shuffle=True)),
        "webdataset and Pillow": _in_workers(peers.pillow_pipeline(data, workload)),
    }
    batches = 2 if options.quick else _batches_a_round(streams["webdataset"])
    work = {name: taker(stream, batches) for name, stream in streams.items()}
    seconds = interleave(work, repeats=options.repeats, warmup=1, clock=FAMILY)
    loader.close()
    del streams, work
    for name, found in seconds.items():
        yield Figure(
            name=f"{workload.name}: {name}",
            unit="samples/s/core",
            value=Quartiles.of([batches * workload.batch / each for each in found]),
        )
    for name in ("webdataset", "webdataset and Pillow"):
        floor, goal = BOUNDS[name]
        yield Figure(
            name=f"{workload.name}: ours / {name}",
            unit="x",
            floor=floor,
            goal=goal,
            value=ratio(seconds[name], seconds["ours"]),
        )


def _in_workers(pipeline: Any) -> Iterator[Any]:
    """Whole batches from torch's workers, as webdataset's manual has it."""
    return iter(
        torch.utils.data.DataLoader(
            pipeline,
            batch_size=None,
            num_workers=WORKERS,
            prefetch_factor=PREFETCH,
            multiprocessing_context="forkserver",
            worker_init_fn=_one_thread,
        )
    )


def _batches_a_round(stream: Iterator[Any]) -> int:
    """Batches that take both workers about `ROUND_SECONDS` together; ticks of 10 ms are then one in
    a hundred."""
    spent = cpu_seconds(taker(stream, 16), FAMILY)
    return max(4, round(16 * ROUND_SECONDS / spent))


def _one_thread(_worker: int) -> None:
    one_thread()
