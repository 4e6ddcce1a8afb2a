"""Peak memory of one loader process, with small shards and with one of a gigabyte.

python -m tools.bench_loader.memory FOLDER TOKENIZER    what one measurement runs
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data_pipeline.shards.writer import write_shards
from tools.bench_loader.figures import Figure, Options
from tools.bench_loader.loading import batches_of, our_loader
from tools.bench_loader.pictures import caption
from tools.bench_loader.workloads import PHOTO, DataSet, prepare
from tools.benchmark import Quartiles, family, note, peak_bytes

BATCHES = 24
LIMIT_MIB = 1024.0


def measure(options: Options) -> Iterator[Figure]:
    """Shards of 10 MB and of 1 GB."""
    workload = PHOTO.quick() if options.quick else PHOTO
    data = prepare(workload, options.root)
    for megabytes in (1, 4) if options.quick else (10, 1000):
        note(f"memory: shards of {megabytes} MB")
        folder = _shards_of(data, options.root / f"shards-of-{megabytes}", megabytes)
        command = [
            sys.executable,
            "-m",
            "tools.bench_loader.memory",
            str(folder),
            str(data.tokenizer),
        ]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks = json.loads(printed.splitlines()[-1])
        value = peaks["worker"] / 2**20
        yield Figure(
            name=f"peak memory of one worker, shards of {megabytes} MB",
            value=Quartiles(value, value, value),
            unit="MiB",
            floor=LIMIT_MIB,
            less_is_better=True,
            note=f"once; resident set; {peaks['imports'] / 2**20:.0f} MiB of it with the first batch",
        )


def main() -> None:
    """Load some batches with one worker; print its peak and what it held when it had made nothing
    yet."""
    data = DataSet(folder=Path(sys.argv[1]), tokenizer=Path(sys.argv[2]))
    loader = our_loader(data, PHOTO, workers=1)
    stream = batches_of(loader)
    next(stream)
    others = family()[1:]
    first = {pid: peak_bytes(pid) for pid in others}
    for batch in islice(stream, BATCHES):
        assert len(batch.images) == PHOTO.batch, batch.problems[:1]
    # The worker is the one that grows most: others only wait for it (fork server, resource
    # tracker).
    peaks = {pid: peak_bytes(pid) for pid in others}
    worker = max(peaks, key=lambda pid: peaks[pid])
    print(json.dumps({"worker": peaks[worker], "imports": min(first[worker], peaks[worker])}))
    loader.close()


def _shards_of(data: DataSet, folder: Path, megabytes: int) -> Path:
    """One shard of about that size (or ten small ones), pictures coming again under other keys."""
    if (folder / "manifest.json").exists():
        return folder
    from tools.bench_loader.loading import pictures_of

    pictures = pictures_of(data)
    mean = sum(map(len, pictures)) / len(pictures)
    count = int(megabytes * 1e6 / mean)
    shards = 1 if megabytes >= 100 else 10
    everything = (
        {
            "__key__": f"{number:08d}",
            "jpg": pictures[number % len(pictures)],
            "txt": caption(number),
        }
        for number in range(count * shards)
    )
    write_shards(everything, folder, samples_per_shard=count)
    return folder


if __name__ == "__main__":
    main()
