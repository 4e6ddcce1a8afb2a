"""Seconds from reading a manifest to the first batch, at the start and the middle of a long epoch.

The epoch is long but needs little disk space: its shards are hard links to a few files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.loader import Loader
from data_pipeline.order.state import LoaderState
from data_pipeline.shards.manifest import load_manifest, write_manifest
from tools.bench_loader.options import Options
from tools.bench_loader.workloads import (
    CONTEXT_LENGTH,
    SEED,
    SMALL,
    BenchmarkData,
    Workload,
    prepare,
)
from tools.measurements import Measurement
from tools.reporting import log_progress
from tools.timing import Quartiles, use_one_thread

SHARDS = 4096
LIMIT_SECONDS = 5.0


def measure(options: Options) -> Iterator[Measurement]:
    """Measure with local shards."""
    use_one_thread()
    workload = SMALL.quick() if options.quick else SMALL
    data = prepare(workload, options.root)
    shards = 32 if options.quick else SHARDS
    folder = _link_long_epoch(data, options.root / f"long-{workload.samples}", shards)
    samples = load_manifest(folder).total_samples
    log_progress(f"seek: an epoch of {samples:,} samples in {shards:,} shards")

    positions = {"beginning": 0, "middle": samples // 2}
    seconds: dict[str, list[float]] = {name: [] for name in positions}
    for _ in range(options.repeats):
        for name, position in positions.items():
            seconds[name].append(first_batch_seconds(str(folder), data, workload, position))
    for name, values in seconds.items():
        yield Measurement(
            name=f"first batch at the {name} of {samples:,} samples",
            value=Quartiles.of(values),
            unit="s",
            floor=LIMIT_SECONDS,
            less_is_better=True,
        )


def first_batch_seconds(
    url: str, data: BenchmarkData, workload: Workload, position: int, *, cache_dir: str = ""
) -> float:
    """Wall-clock seconds from reading the manifest to the first batch at `position`."""
    settings = workload.settings(cache_dir=cache_dir)
    start = time.perf_counter()
    loader = Loader(
        sources=[load_manifest(url)],
        tokenizer=Tokenizer.load(data.tokenizer),
        data=settings,
        batch=BatchSpec(
            image_size=workload.image_size,
            context_length=CONTEXT_LENGTH,
            micro_batch_size=workload.batch,
        ),
        seed=SEED,
        global_batch_size=workload.batch,
        state=LoaderState(position=position),
    )
    (batch,), _ = next(loader.steps())
    seconds = time.perf_counter() - start
    loader.close()
    assert len(batch.images) == workload.batch and not batch.problems, batch.problems[:1]
    return seconds


def _link_long_epoch(data: BenchmarkData, folder: Path, shards: int) -> Path:
    """Fill a folder with many shards that are hard links to those of `data`."""
    if (folder / "manifest.json").exists():
        return folder
    manifest = data.manifest()
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(shards):
        entry = manifest.shards[index % len(manifest.shards)]
        linked = replace(entry, name=f"{index:06d}.tar", index=f"{index:06d}.tar.index")
        for old, new in ((entry.name, linked.name), (entry.index, linked.index)):
            (folder / new).unlink(missing_ok=True)
            os.link(data.folder / old, folder / new)
        entries.append(linked)
    write_manifest(folder, entries)
    return folder
