"""Seconds from a manifest to the first batch, in the middle of a long epoch and at its beginning.

The epoch is made long without much disk: its shards are links to a few files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipeline.loading.loader import Loader
from data_pipeline.order.state import LoaderState
from data_pipeline.shards.manifest import load_manifest, write_manifest
from tools.bench_loader.figures import Figure, Options
from tools.bench_loader.workloads import SEED, SMALL, TEXT_LENGTH, DataSet, Workload, prepare
from tools.benchmark import Quartiles, note, one_thread

SHARDS = 4096
LIMIT_SECONDS = 5.0


def measure(options: Options) -> Iterator[Figure]:
    """Local shards."""
    one_thread()
    workload = SMALL.quick() if options.quick else SMALL
    data = prepare(workload, options.root)
    shards = 32 if options.quick else SHARDS
    folder = _long_epoch(data, options.root / f"long-{workload.samples}", shards)
    samples = load_manifest(folder).total_samples
    note(f"seek: an epoch of {samples:,} samples in {shards:,} shards")
    starts = {"beginning": 0, "middle": samples // 2}
    taken: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(options.repeats):
        for name, position in starts.items():
            taken[name].append(first_batch_seconds(str(folder), data, workload, position))
    for name, seconds in taken.items():
        yield Figure(
            name=f"first batch at the {name} of {samples:,} samples",
            value=Quartiles.of(seconds),
            unit="s",
            floor=LIMIT_SECONDS,
            less_is_better=True,
        )


def first_batch_seconds(
    url: str, data: DataSet, workload: Workload, position: int, *, cache_dir: str = ""
) -> float:
    """Wall seconds from reading the manifest to the first whole batch from `position` on."""
    settings = workload.settings(cache_dir=cache_dir)
    start = time.perf_counter()
    loader = Loader(
        manifests=[load_manifest(url)],
        tokenizer_path=str(data.tokenizer),
        data=settings,
        image_size=workload.image_size,
        context_length=TEXT_LENGTH,
        seed=SEED,
        rank=0,
        world_size=1,
        global_batch_size=workload.batch,
        micro_batch_size=workload.batch,
        state=LoaderState(position=position),
    )
    (batch,), _ = next(loader.steps())
    seconds = time.perf_counter() - start
    loader.close()
    assert len(batch.images) == workload.batch and not batch.problems, batch.problems[:1]
    return seconds


def _long_epoch(data: DataSet, folder: Path, shards: int) -> Path:
    """A folder whose many shards are links to those of `data`."""
    if (folder / "manifest.json").exists():
        return folder
    manifest = data.manifest()
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(shards):
        entry = manifest.shards[number % len(manifest.shards)]
        linked = replace(entry, name=f"{number:06d}.tar", index=f"{number:06d}.tar.index")
        for old, new in ((entry.name, linked.name), (entry.index, linked.index)):
            (folder / new).unlink(missing_ok=True)
            os.link(data.folder / old, folder / new)
        entries.append(linked)
    write_manifest(folder, entries)
    return folder
