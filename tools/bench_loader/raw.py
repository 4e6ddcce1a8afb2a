"""Samples a second of one core without decoding: found by the manifest's index, read, checked, cut
into files."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample
from tools.bench_loader import peers
from tools.bench_loader.figures import Figure, Options
from tools.bench_loader.workloads import SEED, SMALL, WEB, DataSet, Workload, prepare
from tools.benchmark import Quartiles, interleave, note, one_thread, ratio

CHUNK = 64
"""Samples that are asked for at once, as for a micro-batch."""
OURS = "ours, in the order of training"

Files = dict[str, bytes]


def measure(options: Options) -> Iterator[Figure]:
    """Small and middling samples."""
    one_thread()
    for workload in (SMALL, WEB):
        note(f"raw: {workload.name}")
        yield from _measure(workload.quick() if options.quick else workload, options)


def _measure(workload: Workload, options: Options) -> Iterator[Figure]:
    data = prepare(workload, options.root)
    manifest = data.manifest()
    reader = Reader(ShardStore([manifest], workload.settings(), max_open=64))
    straight = [
        (shard, place)
        for shard, entry in enumerate(manifest.shards)
        for place in range(entry.samples)
    ]
    mixed = [straight[number] for number in np.random.default_rng(SEED).permutation(len(straight))]
    readers: dict[str, Callable[[], Iterator[tuple[str, Files]]]] = {
        OURS: lambda: _ours(reader, mixed),
        "ours, one after the other": lambda: _ours(reader, straight),
        "webdataset": lambda: _webdataset(data),
        "tarfile": lambda: _tarfile(data),
    }
    expected = dict(readers["tarfile"]())
    assert len(expected) == workload.samples
    for name, read in readers.items():
        assert dict(read()) == expected, f"{name} gives other files"
    work = {name: _drain(read) for name, read in readers.items()}
    seconds = interleave(work, repeats=options.repeats)
    for name, found in seconds.items():
        floor, goal = (20_000, 40_000) if name == OURS else (None, None)
        yield Figure(
            name=f"{workload.name}: {name}",
            unit="samples/s/core",
            floor=floor,
            goal=goal,
            value=Quartiles.of([workload.samples / cpu for cpu in found]),
        )
    for name in ("webdataset", "tarfile"):
        yield Figure(
            name=f"{workload.name}: ours / {name}",
            unit="x",
            value=ratio(seconds[name], seconds[OURS]),
        )


def _ours(reader: Reader, wanted: list[tuple[int, int]]) -> Iterator[tuple[str, Files]]:
    for first in range(0, len(wanted), CHUNK):
        for sample in reader.read_many(wanted[first : first + CHUNK]):
            assert isinstance(sample, RawSample), sample
            yield sample.key, dict(sample.members)


def _webdataset(data: DataSet) -> Iterator[tuple[str, Files]]:
    for sample in peers.raw_webdataset(data):
        yield (
            sample["__key__"],
            {name: value for name, value in sample.items() if not name.startswith("__")},
        )


def _tarfile(data: DataSet) -> Iterator[tuple[str, Files]]:
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


def _drain(read: Callable[[], Iterator[tuple[str, Files]]]) -> Callable[[], None]:
    def run() -> None:
        for _ in read():
            pass

    return run
