"""Peak memory of one loader worker, with small shards and with one shard of a gigabyte.

`python -m tools.bench_loader.memory FOLDER TOKENIZER` runs one measurement in its own process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data_pipeline.shards.writer import write_shards
from tools.bench_loader.options import Options
from tools.bench_loader.synthetic_images import repeated_samples
from tools.bench_loader.throughput import batches_of, our_loader, read_images
from tools.bench_loader.workloads import PHOTO, BenchmarkData, prepare
from tools.measurements import Measurement
from tools.process_stats import peak_bytes, process_tree
from tools.reporting import log_progress
from tools.timing import Quartiles

BATCHES = 24
LIMIT_MIB = 1024.0


def measure(options: Options) -> Iterator[Measurement]:
    """Measure with shards of 10 MB and of 1 GB."""
    workload = PHOTO.quick() if options.quick else PHOTO
    data = prepare(workload, options.root)
    for megabytes in (1, 4) if options.quick else (10, 1000):
        log_progress(f"memory: shards of {megabytes} MB")
        folder = _write_shards_of(data, options.root / f"shards-of-{megabytes}", megabytes)
        command = [
            *(sys.executable, "-m", "tools.bench_loader.memory"),
            *(str(folder), str(data.tokenizer)),
        ]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks = json.loads(printed.splitlines()[-1])
        value = peaks["worker"] / 2**20
        first_batch = peaks["first_batch"] / 2**20
        yield Measurement(
            name=f"peak memory of one worker, shards of {megabytes} MB",
            value=Quartiles(value, value, value),
            unit="MiB",
            floor=LIMIT_MIB,
            less_is_better=True,
            note=f"one run; resident set; {first_batch:.0f} MiB of it at the first batch",
        )


def main() -> None:
    """Load batches with one worker; print its peak memory in total and at the first batch."""
    data = BenchmarkData(folder=Path(sys.argv[1]), tokenizer=Path(sys.argv[2]))
    loader = our_loader(data, PHOTO, workers=1)
    stream = batches_of(loader)
    next(stream)
    children = process_tree()[1:]
    first_peaks = {pid: peak_bytes(pid) for pid in children}
    for batch in islice(stream, BATCHES):
        assert len(batch.images) == PHOTO.batch, batch.problems[:1]

    # The worker is the child with the highest peak; the fork server and the resource tracker idle.
    peaks = {pid: peak_bytes(pid) for pid in children}
    worker = max(peaks, key=lambda pid: peaks[pid])
    first_batch = min(first_peaks[worker], peaks[worker])
    print(json.dumps({"worker": peaks[worker], "first_batch": first_batch}))
    loader.close()


def _write_shards_of(data: BenchmarkData, folder: Path, megabytes: int) -> Path:
    """Write one large shard or ten small ones of about that size; images repeat with new keys."""
    if (folder / "manifest.json").exists():
        return folder
    images = read_images(data)
    mean_bytes = sum(map(len, images)) / len(images)
    samples_per_shard = int(megabytes * 1e6 / mean_bytes)
    shards = 1 if megabytes >= 100 else 10
    samples = repeated_samples(images, samples_per_shard * shards)
    write_shards(samples, folder, samples_per_shard=samples_per_shard)
    return folder


if __name__ == "__main__":
    main()
