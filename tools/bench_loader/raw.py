"""Samples per second of one core without decoding: located by the index, read, verified, and split
into files."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleRef
from tools.bench_loader import peers
from tools.bench_loader.options import Options
from tools.bench_loader.workloads import SEED, SMALL, WEB, BenchmarkData, Workload, prepare
from tools.measurements import Measurement
from tools.reporting import log_progress
from tools.timing import Quartiles, interleave, ratio, use_one_thread

CHUNK = 64
"""Samples per read request, as for a micro-batch."""
OURS = "ours, in the order of training"

Files = dict[str, bytes]
ReadAll = Callable[[], Iterator[tuple[str, Files]]]


def measure(options: Options) -> Iterator[Measurement]:
    """Measure small and medium-sized samples."""
    use_one_thread()
    for workload in (SMALL, WEB):
        log_progress(f"raw: {workload.name}")
        yield from _measure(workload.quick() if options.quick else workload, options)


def _measure(workload: Workload, options: Options) -> Iterator[Measurement]:
    readers = _readers(workload, prepare(workload, options.root))
    expected = dict(readers["tarfile"]())
    assert len(expected) == workload.samples
    for name, read in readers.items():
        assert dict(read()) == expected, f"{name}: sample contents differ"

    work = {name: _consume(read) for name, read in readers.items()}
    seconds = interleave(work, repeats=options.repeats)
    for name, rounds in seconds.items():
        floor, goal = (20_000, 40_000) if name == OURS else (None, None)
        yield Measurement(
            name=f"{workload.name}: {name}",
            unit="samples/s/core",
            floor=floor,
            goal=goal,
            value=Quartiles.of([workload.samples / cpu for cpu in rounds]),
        )
    for name in ("webdataset", "tarfile"):
        yield Measurement(
            name=f"{workload.name}: ours / {name}",
            unit="x",
            value=ratio(seconds[name], seconds[OURS]),
        )


def _readers(workload: Workload, data: BenchmarkData) -> dict[str, ReadAll]:
    """Functions that read all samples, by name."""
    manifest = data.manifest()
    reader = Reader(ShardStore([manifest], workload.settings(), max_open=64))
    sequential = [
        SampleRef(0, shard, index)
        for shard, entry in enumerate(manifest.shards)
        for index in range(entry.samples)
    ]
    permutation = np.random.default_rng(SEED).permutation(len(sequential))
    shuffled = [sequential[index] for index in permutation]
    return {
        OURS: lambda: _read_ours(reader, shuffled),
        "ours, sequential": lambda: _read_ours(reader, sequential),
        "webdataset": lambda: _read_webdataset(data),
        "tarfile": lambda: _read_tarfile(data),
    }


def _read_ours(reader: Reader, refs: list[SampleRef]) -> Iterator[tuple[str, Files]]:
    for start in range(0, len(refs), CHUNK):
        for sample in reader.read_many(refs[start : start + CHUNK]):
            assert isinstance(sample, RawSample), sample
            yield sample.key, dict(sample.members)


def _read_webdataset(data: BenchmarkData) -> Iterator[tuple[str, Files]]:
    for sample in peers.raw_webdataset(data):
        files = {name: value for name, value in sample.items() if not name.startswith("__")}
        yield sample["__key__"], files


def _read_tarfile(data: BenchmarkData) -> Iterator[tuple[str, Files]]:
    for path in data.shards():
        with tarfile.open(path) as archive:
            key, files = "", Files()
            for member in archive:
                stem, _, extension = member.name.partition(".")
                if stem != key and files:
                    yield key, files
                    files = {}
                key = stem
                contents: Any = archive.extractfile(member)
                files[extension] = contents.read()
            yield key, files


def _consume(read: ReadAll) -> Callable[[], None]:
    def run() -> None:
        for _ in read():
            pass

    return run
