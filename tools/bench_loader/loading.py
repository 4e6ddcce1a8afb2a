"""Samples a second of one core: the loader against other loaders, and against decoding alone.

All run in this process without workers, pictures lie in the page cache, and each goes on for as
many batches a round as it takes to measure well. Before anything is timed, one pass of every stream
is compared with ours.
"""

from __future__ import annotations

import functools
import itertools
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np

from data_pipeline.loading.loader import Loader
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from tools.bench_loader import peers
from tools.bench_loader.decoding import Decoder
from tools.bench_loader.figures import Figure, Options, skipped
from tools.bench_loader.workloads import (
    CROPPED,
    SEED,
    SMALL,
    TEXT_LENGTH,
    WORKLOADS,
    DataSet,
    Workload,
    prepare,
)
from tools.benchmark import Quartiles, interleave, note, one_thread, ratio

ROUND_SECONDS = 0.15
"""About what one round of our loader takes."""
MAX_GRAY_LEVELS = 6.0
"""Mean difference of pictures that another library has decoded and made small."""
CEILING = "decode and resize alone"
BOUNDS = {
    "webdataset": (1.3, 2.0),
    "webdataset shuffled": (1.3, 2.0),
    "webdataset and Pillow": (2.0, 2.5),
    "mosaicml-streaming": (1.0, 1.3),
    CEILING: (0.8, 0.92),
}
"""What our speed must be, and should be, in multiples of another's."""

Made = tuple[bytes, list[int]]
"""A sample in a batch: bytes of its picture, ids of its caption."""


def measure(options: Options) -> Iterator[Figure]:
    """Every workload."""
    one_thread()
    for workload in (SMALL, CROPPED) if options.quick else WORKLOADS:
        note(f"loader: {workload.name} ({workload.what})")
        workload = workload.quick() if options.quick else workload
        yield from _measure(workload, options)


def our_loader(data: DataSet, workload: Workload, **settings: object) -> Loader:
    """A loader from the start, one micro-batch a step."""
    return Loader(
        manifests=[data.manifest()],
        tokenizer_path=str(data.tokenizer),
        data=workload.settings(**settings),
        image_size=workload.image_size,
        context_length=TEXT_LENGTH,
        seed=SEED,
        rank=0,
        world_size=1,
        global_batch_size=workload.batch,
        micro_batch_size=workload.batch,
        state=LoaderState(),
    )


def batches_of(loader: Loader) -> Iterator[Batch]:
    """Its batches, without end."""
    for batches, _ in loader.steps():
        yield from batches


def _measure(workload: Workload, options: Options) -> Iterator[Figure]:
    data = prepare(workload, options.root)
    loader = our_loader(data, workload)
    ours = batches_of(loader)
    streams: dict[str, Iterator[peers.AnyBatch]] = {"ours": ours}
    expected = _one_pass(batches_of(our_loader(data, workload)), workload)
    for name, make in _peers_for(data, workload).items():
        try:
            _check_equal(name, _one_pass(make(passes=1), workload), expected, workload)
            streams[name] = make()
        except peers.Missing as missing:
            yield skipped(f"{workload.name}: ours / {name}", str(missing))
    batches = 1 if options.quick else _batches_a_round(ours)
    work = {name: taker(stream, batches) for name, stream in streams.items()}
    work[CEILING] = _decode_only(data, workload, batches * workload.batch)
    seconds = interleave(work, repeats=options.repeats)
    loader.close()
    yield from _figures(workload, seconds, batches * workload.batch)


def _peers_for(
    data: DataSet, workload: Workload
) -> dict[str, Callable[..., Iterator[peers.PeerBatch]]]:
    makers: dict[str, Callable[..., Iterator[peers.PeerBatch]]] = {
        "webdataset": functools.partial(peers.webdataset, data, workload, shuffle=False),
        "webdataset shuffled": functools.partial(peers.webdataset, data, workload, shuffle=True),
        "mosaicml-streaming": functools.partial(peers.mosaicml, data, workload),
    }
    if not workload.augments:  # our augmentation is not written for Pillow
        makers["webdataset and Pillow"] = functools.partial(
            peers.webdataset_with_pillow, data, workload
        )
    return makers


def _figures(
    workload: Workload, seconds: Mapping[str, list[float]], samples: int
) -> Iterator[Figure]:
    for name in seconds:
        yield Figure(
            name=f"{workload.name}: {name}",
            unit="samples/s/core",
            value=Quartiles.of([samples / cpu for cpu in seconds[name]]),
            note=workload.what if name == "ours" else "",
        )
    for name, (floor, goal) in BOUNDS.items():
        if name in seconds:
            yield Figure(
                name=f"{workload.name}: ours / {name}",
                unit="x",
                floor=floor,
                goal=goal,
                value=ratio(seconds[name], seconds["ours"]),
            )


def _one_pass(stream: Iterator[peers.AnyBatch], workload: Workload) -> dict[str, Made]:
    """What a stream makes of every sample, by key."""
    found: dict[str, Made] = {}
    # A shuffled stream may bring samples of the next pass before the last of this one.
    for batch in islice(stream, 4 * -(-workload.samples // workload.batch)):
        for key, image, ids in zip(
            batch.keys, batch.images.numpy(), batch.text_ids.tolist(), strict=True
        ):
            found[key] = image.tobytes(), [token for token in ids if token]
        if len(found) == workload.samples:
            return found
    raise AssertionError(f"a stream gave {len(found)} of {workload.samples} samples in four passes")


def _check_equal(
    name: str, found: Mapping[str, Made], expected: Mapping[str, Made], workload: Workload
) -> None:
    """The same samples with the same ids and, where nothing is drawn, the same pixels."""
    assert found.keys() == expected.keys(), f"{name} has other samples than ours"
    for key, (image, ids) in found.items():
        assert ids == expected[key][1], f"{name}: other ids for sample {key}"
        assert len(image) == len(expected[key][0]), f"{name}: another size for sample {key}"
        if workload.augments:
            continue
        if name.endswith("Pillow"):
            theirs, own = (
                np.frombuffer(data, np.uint8).astype(np.int16) for data in (image, expected[key][0])
            )
            difference = float(np.abs(theirs - own).mean())
            assert difference < MAX_GRAY_LEVELS, (
                f"{name}: sample {key} differs by {difference:.1f} gray levels"
            )
        else:
            assert image == expected[key][0], f"{name}: other pixels for sample {key}"


def _batches_a_round(ours: Iterator[Batch]) -> int:
    """Batches that take about `ROUND_SECONDS`."""
    for _ in islice(ours, 4):
        pass
    start = time.process_time()
    for _ in islice(ours, 4):
        pass
    return max(1, round(4 * ROUND_SECONDS / (time.process_time() - start)))


def taker(stream: Iterator[object], batches: int) -> Callable[[], None]:
    """A call that takes so many batches."""

    def take() -> None:
        for _ in islice(stream, batches):
            pass

    return take


def _decode_only(data: DataSet, workload: Workload, count: int) -> Callable[[], None]:
    """The limit of all loaders: pictures in memory, decoded and transformed into one and the same
    place."""
    files = itertools.cycle(pictures_of(data))
    decode, out = (
        Decoder(workload),
        np.empty((3, workload.image_size, workload.image_size), np.uint8),
    )

    def run() -> None:
        for file in islice(files, count):
            decode(file, out)

    return run


def pictures_of(data: DataSet) -> list[bytes]:
    """The bytes of the pictures, read by the standard library."""
    found = []
    for shard in data.shards():
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    file = archive.extractfile(member)
                    assert file is not None
                    found.append(file.read())
    return found
