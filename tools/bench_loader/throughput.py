"""Samples per second on one core: this project's loader, other loaders (peers), and decoding alone.

Everything runs in this process without workers, with files in the page cache. A round has as many
batches as the loader reads in about `ROUND_SECONDS`. Before timing, the samples of one pass of
every peer are compared with those of the loader.
"""

from __future__ import annotations

import functools
import itertools
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.loader import Loader
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from tools.bench_loader import peers
from tools.bench_loader.decoding import Decoder
from tools.bench_loader.equality import check_equal, read_one_pass
from tools.bench_loader.mosaicml_peer import mosaicml
from tools.bench_loader.options import Options
from tools.bench_loader.workloads import (
    CONTEXT_LENGTH,
    CROPPED,
    SEED,
    SMALL,
    WORKLOADS,
    BenchmarkData,
    Workload,
    prepare,
)
from tools.measurements import Measurement, not_measured
from tools.reporting import log_progress
from tools.timing import Quartiles, interleave, ratio, use_one_thread

ROUND_SECONDS = 0.15
"""Approximate duration of one round of the loader."""
DECODE_ONLY = "decode and resize alone"
SPEED_TARGETS = {
    "webdataset": (1.3, 2.0),
    "webdataset shuffled": (1.3, 2.0),
    "webdataset and Pillow": (2.0, 2.5),
    "mosaicml-streaming": (1.0, 1.3),
    DECODE_ONLY: (0.8, 0.92),
}
"""Minimum acceptable (floor) and desired (goal) speed of the loader, relative to each baseline."""


def measure(options: Options) -> Iterator[Measurement]:
    """Measure every workload."""
    use_one_thread()
    for workload in (SMALL, CROPPED) if options.quick else WORKLOADS:
        log_progress(f"loader: {workload.name} ({workload.description})")
        yield from _measure(workload.quick() if options.quick else workload, options)


def our_loader(data: BenchmarkData, workload: Workload, **settings: object) -> Loader:
    """A loader at the start of the data, one micro-batch per step."""
    return Loader(
        sources=[data.manifest()],
        tokenizer=Tokenizer.load(data.tokenizer),
        data=workload.settings(**settings),
        batch=BatchSpec(
            image_size=workload.image_size,
            context_length=CONTEXT_LENGTH,
            micro_batch_size=workload.batch,
        ),
        seed=SEED,
        global_batch_size=workload.batch,
        state=LoaderState(),
    )


def batches_of(loader: Loader) -> Iterator[Batch]:
    """An endless iterator over the loader's batches."""
    for batches, _ in loader.steps():
        yield from batches


def batch_consumer(stream: Iterator[object], batches: int) -> Callable[[], None]:
    """A function that reads `batches` batches from a stream."""

    def run() -> None:
        for _ in islice(stream, batches):
            pass

    return run


def read_images(data: BenchmarkData) -> list[bytes]:
    """All image files of the shards, read with `tarfile`."""
    images = []
    for shard in data.shards():
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    file = archive.extractfile(member)
                    assert file is not None
                    images.append(file.read())
    return images


def _measure(workload: Workload, options: Options) -> Iterator[Measurement]:
    data = prepare(workload, options.root)
    loader = our_loader(data, workload)
    ours = batches_of(loader)
    streams: dict[str, Iterator[peers.AnyBatch]] = {"ours": ours}

    expected = read_one_pass(batches_of(our_loader(data, workload)), workload)
    for name, make_stream in _peer_streams(data, workload).items():
        try:
            check_equal(name, read_one_pass(make_stream(passes=1), workload), expected, workload)
            streams[name] = make_stream()
        except peers.Unavailable as error:
            yield not_measured(f"{workload.name}: ours / {name}", str(error))

    batches = 1 if options.quick else _batches_per_round(ours)
    candidates = {name: batch_consumer(stream, batches) for name, stream in streams.items()}
    candidates[DECODE_ONLY] = _decode_only(data, workload, batches * workload.batch)
    seconds = interleave(candidates, repeats=options.repeats)
    loader.close()
    yield from _results(workload, seconds, batches * workload.batch)


def _peer_streams(
    data: BenchmarkData, workload: Workload
) -> dict[str, Callable[..., Iterator[peers.PeerBatch]]]:
    """For each peer, a function that opens a stream of its batches."""
    streams: dict[str, Callable[..., Iterator[peers.PeerBatch]]] = {
        "webdataset": functools.partial(peers.webdataset, data, workload, shuffle=False),
        "webdataset shuffled": functools.partial(peers.webdataset, data, workload, shuffle=True),
        "mosaicml-streaming": functools.partial(mosaicml, data, workload),
    }
    if not workload.augments:  # the augmentation is not implemented for Pillow
        streams["webdataset and Pillow"] = functools.partial(
            peers.webdataset_with_pillow, data, workload
        )
    return streams


def _results(
    workload: Workload, seconds: Mapping[str, list[float]], samples: int
) -> Iterator[Measurement]:
    for name in seconds:
        yield Measurement(
            name=f"{workload.name}: {name}",
            unit="samples/s/core",
            value=Quartiles.of([samples / duration for duration in seconds[name]]),
            note=workload.description if name == "ours" else "",
        )
    for name, (floor, goal) in SPEED_TARGETS.items():
        if name in seconds:
            yield Measurement(
                name=f"{workload.name}: ours / {name}",
                unit="x",
                floor=floor,
                goal=goal,
                value=ratio(seconds[name], seconds["ours"]),
            )


def _batches_per_round(ours: Iterator[Batch]) -> int:
    """Number of batches that take about `ROUND_SECONDS`."""
    for _ in islice(ours, 4):  # warm-up
        pass
    start = time.process_time()
    for _ in islice(ours, 4):
        pass
    return max(1, round(4 * ROUND_SECONDS / (time.process_time() - start)))


def _decode_only(data: BenchmarkData, workload: Workload, count: int) -> Callable[[], None]:
    """A function that only decodes and transforms `count` images from memory into one array.

    Its speed is the upper bound of a loader.
    """
    files = itertools.cycle(read_images(data))
    decode = Decoder(workload)
    out = np.empty((3, workload.image_size, workload.image_size), np.uint8)

    def run() -> None:
        for file in islice(files, count):
            decode(file, out)

    return run
